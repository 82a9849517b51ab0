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
from toolkit.errors import BenchError, QvlError, ServerError

ONE = Served([1, 2], [3, 4], {3: -0.5, 9: -4.0}, [3, 4])


def test_equal_is_equal_to_the_last_digit() -> None:
    assert compare([ONE, ONE], [ONE, ONE]) == Compared(2, 2, 2, 0.0)
    assert compare([ONE], [ONE]).equal
    close = Served([1, 2], [3, 4], {3: -0.5000001, 8: -5.0}, [3, 4])
    assert 0 < compare([ONE], [close]).furthest < 1e-6 and not compare([ONE], [close]).equal
    assert compare([ONE], [Served([1, 2], [3, 5], ONE.first, [3])]).answers == 0


def study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, list[Served] | QvlError]
) -> FormatsSettings:
    """Return the settings of a study whose servers answer by format, on a CPU."""
    monkeypatch.setattr(
        formats, "_answered", lambda directories, chats, tokens: {each: answers[each[1]] for each in directories}
    )
    model = tiny.write(tmp_path / "docs" / "results" / "gemm", version="gemm", group_size=128)
    results = tmp_path / "docs" / "results" / "formats"
    return FormatsSettings(out=results, model=model, samples=1, formats=",".join(answers))


def places(tmp_path: Path) -> set[tuple[str, str]]:
    return {(claim.place.format, claim.kind) for claim in reports(tmp_path / "docs" / "results")}


@pytest.mark.parametrize("alike", [True, False])
def test_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alike: bool) -> None:
    other = ONE if alike else Served([1, 2], [3, 5], ONE.first, [3, 5])
    settings = study(tmp_path, monkeypatch, {"gemm": [ONE], "compressed-tensors": [other], "gemv": [ONE]})
    if alike:
        formats.run(settings)
    else:
        with pytest.raises(BenchError, match="do not answer alike with cpu"):
            formats.run(settings)
    report = json.loads((settings.out / "report.json").read_text())
    assert report["kernels"]["cpu"]["compressed-tensors"]["equal"] == alike
    assert report["kernels"]["cpu"]["gemv"]["equal"]
    assert places(tmp_path) == {(name, "measured") for name in ("gemm", "compressed-tensors", "gemv")}


def test_a_server_that_does_not_start_is_written_down_and_claims_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = ServerError("vLLM died: no kernel")
    settings = study(tmp_path, monkeypatch, {"gemm": [ONE], "compressed-tensors": refused})
    with pytest.raises(BenchError, match="no format could be compared"):
        formats.run(settings)
    report = json.loads((settings.out / "report.json").read_text())
    assert report["kernels"]["cpu"]["compressed-tensors"] == {"why_not": "vLLM died: no kernel"}
    assert places(tmp_path) == {("gemm", "measured")}
