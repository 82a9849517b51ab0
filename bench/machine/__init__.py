"""The machine that is measured on.

environment says what it is: CPU, GPUs, versions, the command that was typed. resources reads memory of processes and
GPUs, energy what the GPUs used, server_metrics what a server counted, by its /metrics.
"""
