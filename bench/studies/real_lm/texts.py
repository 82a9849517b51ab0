"""Texts to calibrate on and to measure with: Python code found where this runs, or any directory's text files."""

from __future__ import annotations

import json
import random
import re
import sysconfig
from pathlib import Path

from toolkit.errors import ManifestError

__all__ = ["read_held", "write_texts"]

#: Files shorter than that, in bytes, have too little to cut from; longer ones are read so far.
_LEAST, _MOST = 6_000, 200_000
#: Characters of a chat's question and answer, and of a text that is measured with.
_QUESTION, _ANSWER, _HELD = 800, 1_600, 4_000
#: Chats that a file gives at most, and files that are read.
_CHATS_A_FILE, _FILES = 8, 1_200
#: What no chat may hold: it would be read as a turn or an image.
_TEMPLATE = re.compile(r"<\|[a-z_]+\|>")


def write_texts(out: Path, directory: Path | None, pattern: str = "*.py") -> tuple[Path, Path]:
    """Write ``calib.jsonl``, chats, and ``held.jsonl``, texts of other files; the same files write the same lines.

    Args:
        out: directory to write to.
        directory: whose files are read, at any depth; None: Python's own and installed packages'.
        pattern: of their names.

    Raises:
        ManifestError: too few files.
    """
    paths = sysconfig.get_paths()
    roots = [directory] if directory is not None else [Path(paths["stdlib"]), Path(paths["purelib"])]
    found = sorted({path for root in roots for path in root.rglob(pattern) if _has_text(path)})
    random.Random(1).shuffle(found)
    found = found[:_FILES]
    if len(found) < 4:
        raise ManifestError(
            f"{len(found)} files {pattern} of {_LEAST} bytes or more under {roots[0]}: at least 4 needed"
        )
    texts = [path.read_text(encoding="utf-8", errors="ignore")[:_MOST] for path in found]
    texts = [text for text in texts if not _TEMPLATE.search(text)]
    half = len(texts) // 2
    chats = [chat for text in texts[:half] for chat in _chats(text)]
    held = [{"text": text[1_500 : 1_500 + _HELD]} for text in texts[half:]]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("calib.jsonl", chats), ("held.jsonl", held)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out / "calib.jsonl", out / "held.jsonl"


def read_held(path: Path) -> list[str]:
    """Return the texts of a JSONL file of ``{"text": ...}``.

    Raises:
        ManifestError: it is missing, or a line has no text.
    """
    if not path.is_file():
        raise ManifestError(f"no texts at {path}: `python -m bench.studies real-lm texts` writes some")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows):
        raise ManifestError(f'{path}: every line must be {{"text": "..."}}')
    return [row["text"] for row in rows]


def _has_text(path: Path) -> bool:
    return path.is_file() and path.stat().st_size >= _LEAST


def _chats(text: str) -> list[dict[str, list[dict[str, str]]]]:
    """Cut a text into chats that do not overlap: what comes next?"""
    size = _QUESTION + _ANSWER
    chats = []
    for start in range(1_500, len(text) - size, size)[:_CHATS_A_FILE]:
        asked, answer = text[start : start + _QUESTION], text[start + _QUESTION : start + size]
        messages = [
            {"role": "user", "content": f"Continue this text:\n{asked}"},
            {"role": "assistant", "content": answer},
        ]
        chats.append({"messages": messages})
    return chats
