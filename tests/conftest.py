"""Settings for all tests."""

from __future__ import annotations

import os
import signal

# Models here are tiny: on two busy cores torch's threads would wait for each other more than they would work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with SIGINT ignored, and programs started by the tests would inherit that: those that
# are sent a Ctrl-C must heed it wherever the tests themselves run.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
