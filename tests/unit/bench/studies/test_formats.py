"""What is equal between two formats is counted, and what is not is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.studies import formats
from bench.studies.formats import Compared, compare
from bench.studies.settings import FormatsSettings
from bench.studies.support import reports
from bench.verify.served import Served
from tests.support import tiny
from toolkit.errors import BenchError

ONE = Served([1, 2], [3, 4], {3: -0.5, 9: -4.0}, [3, 4])


def test_equal_is_equal_to_the_last_digit() -> None:
    assert compare([ONE, ONE], [ONE, ONE]) == Compared(2, 2, 2, 0.0)
    assert compare([ONE], [ONE]).equal
    close = Served([1, 2], [3, 4], {3: -0.5000001, 8: -5.0}, [3, 4])
    assert 0 < compare([ONE], [close]).furthest < 1e-6 and not compare([ONE], [close]).equal
    assert compare([ONE], [Served([1, 2], [3, 5], ONE.first, [3])]).answers == 0


@pytest.mark.parametrize("alike", [True, False])
def test_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alike: bool) -> None:
    other = ONE if alike else Served([1, 2], [3, 5], ONE.first, [3, 5])
    given = iter([[ONE], [other]])
    monkeypatch.setattr(formats, "_served", lambda *arguments: next(given))
    model = tiny.write(tmp_path / "docs" / "results" / "gemm", version="gemm", group_size=128)
    settings = FormatsSettings(out=tmp_path / "docs" / "results" / "formats", model=model, samples=1)
    if alike:
        formats.run(settings)
    else:
        with pytest.raises(BenchError, match="do not answer alike with cpu"):
            formats.run(settings)
    report = json.loads((settings.out / "report.json").read_text())
    assert report["kernels"]["cpu"]["equal"] == alike
    places = {(claim.place.format, claim.kind) for claim in reports(tmp_path / "docs" / "results")}
    assert places == {("gemm", "measured"), ("compressed-tensors", "measured")}
