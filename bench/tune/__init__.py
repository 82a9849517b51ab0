"""`qvl tune`: which of vLLM's settings is fastest here, at each load.

config is what it was told; measure boots candidate after candidate and loads it; journal keeps the figures through
kills; profile says what they mean to `qvl serve`; show draws them; cli is the verb.
"""
