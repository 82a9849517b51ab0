"""Quantizations of one model compared without a server: what is printed is what the weights say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.studies.quality import run
from bench.studies.settings import QualitySettings
from tests.support import rounded
from tests.support.short import calibration, short_demo
from toolkit import console
from toolkit.errors import FormatError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return short_demo(tmp_path_factory.mktemp("source") / "short", layers=2, blocks=1)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration(tmp_path_factory.mktemp("manifest"), samples=6)


def test_finer_groups_are_nearer_and_the_source_is_nearest(
    source: Path,
    manifest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(console.out, "width", 160)
    candidates = [
        rounded.write(tmp_path / f"groups-{size}", frozenset(), group_size=size, source=source) for size in (128, 32)
    ]
    out = tmp_path / "quality.json"
    settings = QualitySettings(source=str(source), data=str(manifest), out=out, device="cpu")
    found = run([*candidates, source], settings)
    coarse, fine, same = found["candidates"]
    assert json.loads(out.read_text()) == found
    assert found["answers"] == 6 and found["dtype"] == "float32"
    assert coarse["over_first"]["geometric"] == {"value": 1, "low": 1, "high": 1}
    assert fine["over_first"]["geometric"]["value"] < 1
    assert coarse["bytes"] < fine["bytes"] < same["bytes"]
    assert same["kl"]["mean"]["value"] < 1e-9 and same["changed"] == 0
    mean = sum(kl for kl in coarse["answer_kl"]) / 6
    assert 0.2 < coarse["kl"]["mean"]["value"] / mean < 5  # one is over tokens, the other over answers
    said = capsys.readouterr().out
    assert "groups-32" in said and "6 answers" in said


def test_what_is_made_of_another_model_is_refused(source: Path, manifest: Path, tmp_path: Path) -> None:
    other = short_demo(tmp_path / "other", layers=1, blocks=1)
    with pytest.raises(FormatError, match=r"has num_hidden_layers 1 and .* 2: it is not made of that model"):
        run([other], QualitySettings(source=str(source), data=str(manifest), device="cpu"))
