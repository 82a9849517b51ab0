"""Inner loops of the search as Triton kernels, for GPUs; plain torch does the same beside each, one floor up.

clip: all bounds of a group at once. compensate: compensated rounding of a block of columns; rounding: what it works on.
trust: each is held against plain torch before it is first used, and left alone where it rounds otherwise.
"""
