"""Where weights come from.

directory: what a user names (a directory, a hub id, demo), as a directory on this machine. hub: fetching from the
Hugging Face hub into its own cache. adapter: a LoRA, merged into its base. random_model: a published shape with random
weights, without a hub.
"""
