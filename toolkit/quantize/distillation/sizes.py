"""How much of what distillation holds: read by what plans a run and by what does it."""

__all__ = ["CHUNK_TOKENS", "EPOCHS", "LOGITS"]

#: Tokens that pass through all layers at once, to start with; halved when the device runs out of memory.
CHUNK_TOKENS = 4096
#: Logits that are held at once, in some five copies.
LOGITS = 2**26
#: Passes over the samples.
EPOCHS = 1
