from __future__ import annotations

import json as stdlib_json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from bench import report as reports
from bench.client import Failure
from bench.report import html, json, markdown, terminal, words
from bench.report.compare import Side, compare
from bench.report.model import Report
from bench.tasks import Question
from tests.bench.factory import report
from toolkit.errors import BenchError


@pytest.fixture(scope="module")
def page() -> str:
    return html.render(report({"candidate": {"red-1"}}, speed={"candidate": 0.8}))


def test_json_survives_a_round_trip(tmp_path: Path) -> None:
    found = report({"candidate": {"red-1"}})
    (tmp_path / "report.json").write_text(json.render(found))
    assert json.read(tmp_path) == json.read(tmp_path / "report.json") == found


def test_the_schema_has_a_version() -> None:
    assert stdlib_json.loads(json.render(report()))["schema_version"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no report there"),
        ("{", "can't be read as JSON"),
        ("[]", "no schema_version"),
        ("{}", "no schema_version"),
        ('{"schema_version": 99}', "schema version 99, this qvl reads 1"),
        ('{"schema_version": 1}', "not a valid report"),
    ],
)
def test_what_is_no_report_is_said(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(BenchError, match=words):
        json.read(tmp_path)


def test_unknown_keys_are_refused() -> None:
    data = stdlib_json.loads(json.render(report())) | {"extra": 1}
    with pytest.raises(ValueError, match="extra"):
        Report.model_validate(data)


def test_three_files_are_written(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "r"
    reports.write(report(), out)
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.json", "report.md"]
    assert list(out.parent.iterdir()) == [out]


def test_an_existing_report_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "r"
    reports.write(report(), out)
    with pytest.raises(BenchError, match="--force"):
        reports.check_target(out, force=False)
    reports.write(report(per_task=3), out, force=True)
    assert json.read(out).workload.questions == 6
    assert list(tmp_path.iterdir()) == [out]


def test_force_replaces_nothing_but_reports(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(BenchError, match="not replaced even with --force"):
        reports.check_target(tmp_path, force=True)
    file = tmp_path / "precious"
    with pytest.raises(BenchError, match="not replaced"):
        reports.check_target(file, force=True)


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BenchError, match="No space left"):
        reports.write(report(), tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


class Page(HTMLParser):
    """Collects what a page loads, its ids and its text, and checks that tags close."""

    VOID = ("meta", "link", "br", "hr", "img", "input", "path", "use", "rect", "line", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action") and value and not value.startswith(("#", "data:")):
                self.loads.append(value)
            if name == "id" and value:
                self.ids.append(value)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    assert found.stack == []
    return found


def test_the_page_needs_nothing_else(page: str) -> None:
    found = parsed(page)
    assert found.loads == []
    assert "<script" not in page and "@import" not in page
    assert not re.search(r"url\((?!#|data:)", page)


def test_ids_are_unique(page: str) -> None:
    ids = parsed(page).ids
    assert len(ids) == len(set(ids))


def test_plots_take_the_pages_colours(page: str) -> None:
    assert page.count('<svg role="img"') == 5  # accuracy, TTFT, TPOT, E2E, throughput
    assert "var(--candidate)" in page
    assert "#0a0b0" not in page


def test_the_pages_figures_are_the_reports(page: str) -> None:
    text = " ".join(" ".join(parsed(page).text).split())
    for figure in ("97.5%", "100.0%", "−2.5", "×0.80", "lost", "red-1"):
        assert figure in text


def test_what_is_printed_is_escaped() -> None:
    asked = [Question("<b>id", "<i>task", "<script>alert(1)</script>", ("yes",))]
    page = html.render(report({"candidate": {"<b>id"}}, asked=asked))
    assert "<script" not in page and "<i>task" not in page
    parsed(page)


@pytest.mark.parametrize(
    "found",
    [
        report(failure=Failure("http", "HTTP 500: <no>")),
        report(asked=[]),
        report(counted=False),
        report(per_task=1),
    ],
    ids=["failed", "speed only", "no counts", "one question"],
)
def test_every_kind_of_report_renders(found: Report) -> None:
    parsed(html.render(found))
    assert found.verdict.sentence in markdown.render(found)
    console = Console(record=True, width=100)
    terminal.show(found, console)


def test_a_failed_report_says_so_first() -> None:
    page = html.render(report(failure=Failure("http", "HTTP 500: gone")))
    assert page.index("Run failed") < page.index("<h2")
    assert 'class="cards"' not in page


def test_markdown_tables_have_equal_columns() -> None:
    text = markdown.render(report({"candidate": {"red-1"}}))
    for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE):
        assert len({line.count("|") for line in table.strip().split("\n")}) == 1
    assert "(E2E - TTFT) / (n_out - 1)" in text


def test_the_terminal_shows_a_comparison() -> None:
    console = Console(record=True, width=120)
    found = compare(Side(report(), "candidate"), Side(report(speed={"candidate": 2.0}), "candidate"))
    terminal.show_comparison(found, console)
    text = console.export_text()
    assert "+100%" in text and "ttft_p50@4" in text and "p99" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.6, "1,235"),
        (123.45, "123"),
        (12.345, "12.3"),
        (1.2345, "1.23"),
        (0.12345, "0.123"),
        (-3.0, "−3.00"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert words.number(value) == text


def test_small_words() -> None:
    assert words.points(-0.0001) == "0.0"
    assert words.points(-0.021) == "−2.1"
    assert words.p_value(0.0001) == "< 0.001"
    assert words.gib(3 * 2**30) == "3.00 GiB"
    assert words.gib(None) == "–"
    assert words.change(100, 88) == "−12%"
    assert words.change(0, 1) == "–"
