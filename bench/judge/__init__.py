"""What measurements prove: statistics without anything of servers or reports.

stats holds intervals and tests (Tango, McNemar, bootstrap by cluster, Holm); verdict says ``no worse``, ``worse`` or
``can't tell`` of a difference, and how many questions would tell; fidelity compares two systems' tokens: KL divergence,
agreement, perplexity.
"""
