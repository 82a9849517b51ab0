"""Measures a candidate against a baseline: accuracy, fidelity, latency, throughput. Knows a server only as a URL.

From low to high: roles; load (requests, clocks, formulas); questions (what is asked, how it is scored); judge
(statistics and verdicts); machine (what it is, memory, energy, the server's counters); run (one bench, as it goes);
report (what is said of it, and how two are compared); tune (the fastest settings); cli (the verbs).
Not installed: micro (pytest-benchmark), chaos (faults, soak), studies (measurements behind docs/results).
"""
