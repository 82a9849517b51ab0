"""Samples through a model that is never in memory whole.

shell: what comes before the decoder layers, where samples become hidden states. states: those, joined without padding.
layers: the decoder layers, read one at a time. passing: all samples through a layer, in micro-batches that back off
when memory is short. sizes: how many tokens at once, and how many are held back. Nothing here knows of quantizing.
"""
