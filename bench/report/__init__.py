"""What a bench found, as one schema in three formats, and how two of them compare.

schema is the shape; build makes it of an outcome, with speed, accuracy and fidelity a module each, words for sentences
and thumbnails for the images; render writes it as JSON, markdown and HTML and on the terminal; compare holds several
against each other. Here: the directory of a report, written whole or not at all.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from bench.report.schema import Report
from bench.run.journal import JOURNAL
from toolkit.errors import BenchError
from toolkit.files import put_in_place

__all__ = ["check_target", "clear", "kept", "write"]


def check_target(out: Path, force: bool) -> None:
    """Refuse a target that exists, before anything is measured.

    Raises:
        BenchError: ``out`` exists and ``force`` is not given, or it holds something that is no report.
    """
    if not out.exists():
        return
    if kept(out) and not force:
        raise BenchError(f"{out} holds a run that is not complete; go on with --resume, or start anew with --force")
    if not force:
        raise BenchError(f"{out} exists; choose another --out, or replace it with --force")
    if not out.is_dir() or (any(out.iterdir()) and not kept(out) and not (out / "report.json").is_file()):
        raise BenchError(f"{out} is not a report of `qvl bench`; it is not replaced even with --force")


def clear(out: Path, force: bool) -> None:
    """Check the target, and forget what an incomplete run kept there; an old report stays until the new one is written.

    Raises:
        BenchError: as `check_target`.
    """
    check_target(out, force)
    (out / JOURNAL).unlink(missing_ok=True)


def kept(out: Path) -> bool:
    """Whether ``out`` holds what an incomplete run has measured."""
    return (out / JOURNAL).is_file()


def write(report: Report, out: Path, *, force: bool = False, more: Callable[[Path], None] | None = None) -> None:
    """Write report.json, report.md and report.html to the directory ``out``, all of them or nothing. What a run has
    kept there stays until its report is ``ok``.

    Args:
        more: writes what else belongs there, into the directory that it is given.
    """
    from bench.report.render import html_file, json_file, markdown

    if not kept(out):
        check_target(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        for name, render in (("json", json_file.render), ("md", markdown.render), ("html", html_file.render)):
            (draft / f"report.{name}").write_text(render(report), encoding="utf-8")
        if more:
            more(draft)
        if report.status != "ok" and kept(out):
            shutil.copyfile(out / JOURNAL, draft / JOURNAL)
        put_in_place(draft, out, draft.with_name(f"{draft.name}.old"))
    except OSError as error:
        raise BenchError(f"the report can't be written to {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
