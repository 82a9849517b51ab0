"""What a model family is, as facts: one file a family, in one object that everything else is given.

family: the class, and what follows from its facts. qwen2_vl, qwen2_5_vl, qwen3_vl: one each. families: all that are
supported, found by a config. Nothing here reads a file; a checkpoint says which family it is of (`Checkpoint.family`).

A further family is one file like qwen2_vl.py, an entry in families.py, and its tests.
"""
