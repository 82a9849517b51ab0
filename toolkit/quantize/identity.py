"""What a run's layers follow from, as nested JSON: equal identities, equal layers; else what differs, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["changes", "digest", "environment_notes", "file_stamps", "source_identity"]

#: Changed settings named in an error; a source copied anew changes all its files.
_SHOWN_CHANGES = 8


def source_identity(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Return size (bytes) and mtime_ns of config.json and each weight file, by name: equal stamps, equal source."""
    return file_stamps({checkpoint.path / "config.json", *(t.file for t in checkpoint.tensors.values())})


def file_stamps(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Return size (bytes) and mtime_ns of files, by name."""
    stats = {file.name: file.stat() for file in sorted(files)}
    return {name: {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats.items()}


def digest(identity: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that stand for an identity, whatever the order of its keys."""
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return how two identities differ, "recipe.group_size was 128, now 64; ...", or an empty text."""
    old, new = dict(_flatten(before)), dict(_flatten(now))
    found = [
        f"{key} was {_show(old, key)}, now {_show(new, key)}"
        for key in sorted({*old, *new})
        if _show(old, key) != _show(new, key)
    ]
    more = [f"and {len(found) - _SHOWN_CHANGES} more"] if len(found) > _SHOWN_CHANGES else []
    return "; ".join(found[:_SHOWN_CHANGES] + more)


def environment_notes(before: Sequence[dict[str, Any]], now: dict[str, Any], layers: int) -> list[str]:
    """Return a note for each fact, such as a version, that was another when some of the ``layers`` so far were made."""
    notes = []
    for key in sorted({*now, *(key for environment in before for key in environment)}):
        others = {_show(environment, key) for environment in before} - {_show(now, key)}
        if others:
            notes.append(
                f"the {layers} layers so far were made with {key} {' and '.join(sorted(others))}, "
                f"now it is {_show(now, key)}: the files may differ in the last bit from those of a single run"
            )
    return notes


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested dict with their dotted paths."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not there"
