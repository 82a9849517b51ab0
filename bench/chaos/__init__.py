"""What happens to a server when something breaks, or nobody behaves; run from a checkout, not installed.

cli is the command line, settings what a run is asked for. faults kills, stops and starves a server under load, with
gpu_memory (another program that takes a GPU's memory) and settable_clock (a wall clock that jumps). soak sends good and
bad requests for a long time; hostile is the catalogue of the bad ones.
"""
