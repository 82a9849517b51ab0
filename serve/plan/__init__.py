"""What fits a card, and what is fast on it, before anything is booted.

capacity: weights, activations, KV cache and context from shapes alone; load: what the server is to take. tuned fills a
ServerConfig in from a profile and from the card's room; candidates: what `qvl tune` tries. cli: `qvl plan`.
"""
