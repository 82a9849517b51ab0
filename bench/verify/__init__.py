"""`qvl verify`: one model through transformers and through a server, on the same images, and what makes them differ.

samples: what is asked. served: a server's side. reference: transformers' side, in float32 and, for how far rounding
alone goes, in 16 bits. compare: what is equal, what is not, and why. view: a table, or JSON.
"""
