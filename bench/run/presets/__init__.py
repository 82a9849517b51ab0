"""Settings of `qvl bench` by name, a file each: how much is measured (full, quick), what requests look like (a use).

A file's keys are the fields of `bench.run.config.BenchConfig`, its values as on the command line. A use also says, in
``use``, what it stands for, with the tokens that its images cost Qwen2-VL (one for 28 x 28 pixels); its lengths are
choices that stand for that, not statistics of it.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from toolkit.errors import BenchError

__all__ = ["USES", "load", "workload"]

#: What `--preset` takes.
USES = ("chat", "ocr-document", "multi-image")


@cache
def load(name: str) -> dict[str, Any]:
    """Return what a file sets."""
    found: dict[str, Any] = tomllib.loads((files(__name__) / f"{name}.toml").read_text(encoding="utf-8"))
    return found


def workload(name: str) -> dict[str, Any]:
    """Return the settings of a use.

    Raises:
        BenchError: there is none of that name.
    """
    if name not in USES:
        uses = "; ".join(f"{known}: {load(known)['use']}" for known in USES)
        raise BenchError(f"--preset {name!r}: choose one of {uses}")
    return {field: value for field, value in load(name).items() if field != "use"}
