"""Where the repository's files are, wherever a test is."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RESULTS = DOCS / "results"
#: Reports that older versions wrote, to be read for ever.
OLD_REPORTS = ROOT / "tests" / "support" / "reports"
