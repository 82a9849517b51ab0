"""What the model is shown while it is quantized.

manifest: a JSONL file of chats, read and checked. forms: what other tools write, as messages. media: images by path,
URL or data URL, for all three packages. inputs: chats as model inputs, sample by sample, as the server will see them.
"""
