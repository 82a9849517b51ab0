"""The embedded Qwen2-VL: small, trained, and so able to lose quality.

checkpoint/: its weights. train, learn, feed, optim, model: how they were made. export, model_card, record: as a
checkpoint. evaluate, quiz, prompt: how often it is right. fidelity: how far a quantized one has drifted.
What it is asked is drawn by `toolkit.tasks`.
"""
