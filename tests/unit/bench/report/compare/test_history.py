"""Many reports in one view: what changed, told through the baseline that all of them measured."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.report.compare.figures import Side
from bench.report.compare.history import found_in, tracks
from bench.report.render.json_file import render
from bench.report.schema import Report
from tests.support.command import exit_code
from tests.support.factory import report
from toolkit import console
from toolkit.cli import app
from toolkit.errors import BenchError

DAY = datetime(2026, 3, 1, 12, tzinfo=UTC)


def made(day: int, machine: float, candidate: float = 1.0) -> Report:
    """A report of a day on which the machine took so many times as long for both."""
    found = report(speed={"baseline": machine, "candidate": machine * candidate})
    return found.model_copy(update={"created": DAY + timedelta(days=day)})


def written(directory: Path, *reports: Report) -> Path:
    for number, each in enumerate(reports):
        (directory / f"r{len(reports) - number}").mkdir(parents=True)
        (directory / f"r{len(reports) - number}" / "report.json").write_text(render(each))
    return directory


def test_what_the_machine_did_is_left_out_and_shown_beside_it() -> None:
    # On the second day the machine was half as fast; on the third the candidate was a fifth slower too.
    sides = [Side(each, "candidate") for each in (made(0, 1.0), made(1, 2.0), made(2, 2.0, 1.2))]
    [tpot] = [track for track in tracks(sides) if track.metric.name == "tpot_p50"]
    first, second, third = tpot.moments
    assert first.row is None and first.machine == 0.0
    assert second.row and third.row and second.value == pytest.approx(2 * (first.value or 0.0))
    assert second.row.change.value == pytest.approx(0.0, abs=1e-9) and second.machine == pytest.approx(1.0)
    assert third.row.change.value == pytest.approx(0.2) and third.machine == pytest.approx(1.0)
    accuracy = tracks(sides)[0]
    assert accuracy.metric.name == "accuracy" and all(m.machine in (None, 0.0) for m in accuracy.moments)


def test_reports_are_read_from_their_directory_and_put_in_order(tmp_path: Path) -> None:
    directory = written(tmp_path / "nightly", made(0, 1.0), made(1, 1.0), made(2, 1.0))
    found = found_in([directory, directory / "r1"])  # one of them twice
    assert [path.name for path, _ in found] == ["r3", "r2", "r1"]
    with pytest.raises(BenchError, match="takes two reports or more"):
        found_in([directory / "r1"])
    with pytest.raises(BenchError, match="no report there"):
        found_in([directory / "r1", tmp_path / "nowhere"])


def test_the_verb_shows_a_table_and_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out, "width", 160)
    directory = written(tmp_path / "nightly", made(0, 1.0), made(1, 2.0), made(2, 2.0, 1.2))
    result = CliRunner().invoke(app, ["history", str(directory), "--html", str(tmp_path / "new" / "page.html")])
    assert result.exit_code == 0, result.output
    for words in ("accuracy, all", "TPOT p50, 1 in flight", "baseline by itself", "+100%", "+20%", "2026-03-03"):
        assert words in result.output, words
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.count('<svg role="img"') == len(tracks([Side(r, "candidate") for _, r in found_in([directory])]))
    assert "3 reports, 2026-03-01 to 2026-03-03" in page and "<script" not in page
    assert "http" not in page.split("<svg")[0]
    assert "which was the same, and is left out" in page


def test_what_can_t_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = made(1, 1.0)
    work = other.workload.model_copy(update={"output_tokens": "99"})
    directory = written(tmp_path / "nightly", made(0, 1.0), other.model_copy(update={"workload": work}))
    assert exit_code(app, "history", directory) == 2
    assert "can't be compared" in " ".join(capsys.readouterr().err.split())
    assert exit_code(app, "history", directory, "--anyway") == 0
