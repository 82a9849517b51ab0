"""training.json and accuracy.json: what a demo checkpoint was made with, and how often it is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError

__all__ = ["ACCURACY", "TRAINING", "read_record", "write_record"]

TRAINING, ACCURACY = "training.json", "accuracy.json"
_WIDTH = 118


def write_record(path: Path, facts: dict[str, Any]) -> None:
    """Write facts as JSON that people can read: what fits a line stands on one."""
    path.write_text(_lay_out(facts, 0) + "\n", encoding="utf-8")


def _lay_out(value: Any, depth: int) -> str:
    flat = json.dumps(value)
    if len(flat) + depth <= _WIDTH or not isinstance(value, dict | list):
        return flat
    if isinstance(value, dict):
        (start, end), parts = "{}", [f"{json.dumps(k)}: {_lay_out(v, depth + 1)}" for k, v in value.items()]
    else:
        (start, end), parts = "[]", [_lay_out(item, depth + 1) for item in value]
    inside = ",\n".join(" " * (depth + 1) + part for part in parts)
    return f"{start}\n{inside}\n{' ' * depth}{end}"


def read_record(path: Path) -> dict[str, Any]:
    """Read what :func:`write_record` wrote. Raises ``CheckpointError`` when there is no such record."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: qvl demo-model writes it") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from None
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return facts
