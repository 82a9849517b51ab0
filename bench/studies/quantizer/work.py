"""One part of the quantizer's benchmark in a process of its own: ``python -m bench.studies.quantizer.work PART
SETTINGS``."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

from bench.machine.environment import cpu_name, gpu_names, versions
from bench.studies.quantizer.settings import Settings
from toolkit.console import fail
from toolkit.errors import BenchError, QvlError


def main(part: str, file: str) -> int:
    """Do a part; write it, with when and on what it was measured, to ``PART.json`` beside the settings."""
    from bench.studies.quantizer.parts import PART_FUNCTIONS

    settings = Settings.load(Path(file))
    try:
        if not gpu_names() and not settings.tiny:
            raise BenchError("real shapes need a GPU, and there is none: --tiny shows that everything runs")
        found = PART_FUNCTIONS[part](settings)
    except QvlError as error:
        fail(f"{part}: {error}")
        return 2
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": ", ".join(gpu_names()) or cpu_name(),
        "versions": versions(),
        "tiny": settings.tiny,
        "stock": settings.stock_python is not None,
    }
    (settings.work / f"{part}.json").write_text(json.dumps({"about": about, **found}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
