"""Products of 4-bit weights with few rows, on Hopper (docs/kernels.md). Not yet what `qvl serve` runs.

w4a16.cu: the kernel, and how it differs from Marlin. nvrtc: from its source to machine code, kept on disk. driver: into
the GPU and launched. plans, plans.json: how the work is cut up, by shape, as it was measured. product: the kernels of a
shape, chosen by rows. tiles: the layout of the weights, in numpy.
"""
