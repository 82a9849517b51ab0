"""What a server is started with.

config (ServerConfig: all of it, and `qvl serve`'s command line) holds limits (the guard's), parallel, lora, tls and
engine (what a profile sets). profiles: what was measured, and which of it is taken; backend: CPU or GPU, and which
vLLM. arguments makes vLLM's command line of a ServerConfig, flags refuses what may not be added to it. environment
names every variable that a server's process reads; ready, play and log_config are what it finds there. ask: `qvl ask`'s
own.
"""
