"""README's chart says what the reports say that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.report.render import json_file
from bench.studies.chart import REPORTS, draw, pair
from tests.support.paths import OLD_REPORTS, ROOT
from toolkit.errors import BenchError

RESULTS = ROOT / "docs" / "results"


def words(svg: Path) -> str:
    return " ".join(re.findall(r"<text[^>]*>(.*?)</text>", svg.read_text(), re.DOTALL))


def test_the_chart_in_the_docs_has_the_figures_of_its_reports() -> None:
    shown = words(ROOT / "docs/images/speed.svg")
    for name, directory in REPORTS:
        found = pair(name, json_file.read(RESULTS / directory))
        assert name in shown and found.machine in shown, "make it anew: python -m bench.studies chart"
        for ms in found.ms.values():
            assert f"{ms:.2f} ms" in shown
        for gib in found.gib.values():
            assert f"{gib:.1f} GiB" in shown


def test_it_can_be_drawn_anew(tmp_path: Path) -> None:
    draw([(name, RESULTS / directory) for name, directory in REPORTS], tmp_path / "out" / "a.svg")
    assert words(tmp_path / "out" / "a.svg") == words(ROOT / "docs/images/speed.svg")


def test_a_report_without_the_figures_is_named() -> None:
    with pytest.raises(BenchError, match="tiny: no time per token"):
        pair("tiny", json_file.read(OLD_REPORTS / "accuracy-of-schema-1"))
