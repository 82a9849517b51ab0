"""report.json: written whole, read back with a message for every way in which it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from bench.report.model import SCHEMA_VERSION, Report
from toolkit.errors import BenchError

__all__ = ["FILE", "read", "render"]

FILE = "report.json"


def render(report: Report) -> str:
    """Return the report as indented JSON."""
    return report.model_dump_json(indent=1) + "\n"


def read(path: Path) -> Report:
    """Read a report from its directory or file.

    Raises:
        BenchError: no such report, not JSON, another schema version, or not a report.
    """
    file = path / FILE if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BenchError(
            f"{path}: no report there; expected a report directory or a {FILE} written by `qvl bench`"
        ) from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BenchError(f"{file}: can't be read as JSON ({error})") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise BenchError(f"{file}: not a report of `qvl bench` (no schema_version)")
    if version != SCHEMA_VERSION:
        raise BenchError(
            f"{file}: schema version {version}, this qvl reads {SCHEMA_VERSION}; "
            "use the qvl that wrote it, or measure again"
        )
    try:
        return Report.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BenchError(
            f"{file}: not a valid report: {where}: {first['msg']} ({error.error_count()} problems)"
        ) from error
