"""The processes of a server.

lifecycle starts vLLM, waits until it has answered, and stops it; launch: its environment and the start itself; bootlog:
what its log says. state writes down which servers run, status says how they are, trust knows their certificates, memory
whether a model fits, repack makes GEMV checkpoints readable. supervisor starts a server again when it dies: in
foreground, which is `qvl serve` in a terminal, or in detached, a process of its own.
"""
