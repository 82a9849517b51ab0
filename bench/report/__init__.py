"""What a bench found, as one schema in three formats, and how two of them compare."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from bench.report.model import Report
from toolkit.errors import BenchError

__all__ = ["check_target", "write"]


def check_target(out: Path, force: bool) -> None:
    """Refuse a target that exists, before anything is measured.

    Raises:
        BenchError: ``out`` exists and ``force`` is not given, or it holds something that is no report.
    """
    if not out.exists():
        return
    if not force:
        raise BenchError(f"{out} exists; choose another --out, or replace it with --force")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "report.json").is_file()):
        raise BenchError(f"{out} is not a report of `qvl bench`; it is not replaced even with --force")


def write(report: Report, out: Path, *, force: bool = False) -> None:
    """Write report.json, report.md and report.html to the directory ``out``, all of them or nothing."""
    from bench.report import html, json, markdown

    check_target(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        for name, render in (("json", json.render), ("md", markdown.render), ("html", html.render)):
            (draft / f"report.{name}").write_text(render(report), encoding="utf-8")
        replaced = draft.with_name(f"{draft.name}.old")
        if out.exists():
            out.rename(replaced)
        draft.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise BenchError(f"the report can't be written to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
