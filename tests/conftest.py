"""Settings for all tests."""

from __future__ import annotations

import os

# Models here are tiny: on two busy cores torch's threads would wait for each other more than they would work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
