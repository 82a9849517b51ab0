"""Scales, clips and rounding of one decoder layer.

strategy: what a search is given and decides, and the protocol of a way of searching: moments (the default; start
there), autoawq (AutoAWQ's own loop, which alone imports awq) and nearest. What moments is made of, from the bottom:
grid, gram, clips, compensate, scales, rounding; kernels/ has their GPU versions. sensitivity: what a vision token
counts. mixed: which linears stay in 16 bits. sizes: how many rows a search looks at.
"""
