"""Our linear kernels for vLLM.

On CPUs without AVX-512: unpacked (4-bit weights as the 16 bits that they stand for), words, and plugin, by which vLLM
finds it. On Hopper, not yet what `qvl serve` runs (docs/kernels.md): w4a16.cu, the kernel for few rows, and how it
differs from Marlin; nvrtc and driver, from its source to a launch; plans, how the work is cut up by shape; product, the
kernels of a shape, chosen by rows; tiles, the layout of the weights, in numpy.
"""
