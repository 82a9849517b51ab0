"""The verbs of bench but `tune`: bench, compare and schema, demo and gpu-bench.

servers is what this machine offers to a bench, progress its bars, commands runs qvl as a process of its own. Modules
import what is heavy inside their functions: `qvl --help` is to be fast.
"""
