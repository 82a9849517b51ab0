"""A checkpoint directory: read, checked, described and written, whole or refused.

checkpoint: one that is open, with config (what config.json says) and weights (what the files hold). writer: a directory
that appears at once. anatomy: the tensors a config calls for. layouts: shapes of packed tensors. left_out: linears in
16 bits, as engines are told. engines: which engine runs it. inspection, inspection_view: what `qvl inspect` finds and
prints.
"""
