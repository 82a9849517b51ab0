"""The figures of one card: what is measured of which servers, and the profiles that come of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.cli import commands
from bench.report.render.json_file import read
from bench.studies import gpu_figures as card
from bench.studies.cli import app
from bench.studies.settings import CardSettings
from serve.settings import profiles
from tests.support.command import exit_code
from tests.support.paths import RESULTS
from toolkit.errors import BenchError

H100 = RESULTS / "h100"
SHIPPED = Path(profiles.__file__).parent / "profiles"


def test_a_shipped_profile_is_what_the_reports_say(tmp_path: Path) -> None:
    where = ("--work", tmp_path / "w", "--out", H100, "--profiles", tmp_path / "p")
    assert exit_code(app, "gpu-figures", "profile", *where) == 0
    made = sorted((tmp_path / "p").iterdir())
    assert [path.name for path in made] == [path.name for path in sorted(SHIPPED.glob("*.json"))]
    for path in made:
        assert path.read_text() == (SHIPPED / path.name).read_text()
    seven = json.loads(next(path for path in made if "3584" in path.name).read_text())
    report = read(H100 / "7b-awq-qvl-against-awq")
    alone = {p.role: p.throughput("output_tokens_per_s") for p in report.speed if p.load.concurrency == 1}
    assert seven["loads"][0]["figures"] == {"vllm": alone["baseline"], "qvl": alone["candidate"]}
    assert [load["concurrency"] for load in seven["loads"]] == [1, 8, 32, 128]


def test_bursts_are_no_basis_for_a_choice(tmp_path: Path) -> None:
    report = json.loads((H100 / "7b-awq-qvl-against-awq" / "report.json").read_text())
    for point in report["speed"]:
        if point["load"]["concurrency"] >= 32:
            point["requests"] = 2 * point["load"]["concurrency"] * point["rounds"]  # two waves a round
    (tmp_path / "r" / "7b-awq-qvl-against-awq").mkdir(parents=True)
    (tmp_path / "r" / "7b-awq-qvl-against-awq" / "report.json").write_text(json.dumps(report))
    where = ("--work", tmp_path / "w", "--out", tmp_path / "r", "--profiles", tmp_path / "p")
    assert exit_code(app, "gpu-figures", "profile", *where) == 0
    (path,) = (tmp_path / "p").iterdir()
    assert [load["concurrency"] for load in json.loads(path.read_text())["loads"]] == [1, 8]


def test_sixteen_bits_are_measured_before_kernels() -> None:
    found = card.pairs([card.SHAPES["7b"], card.SHAPES["2b"]])
    assert [pair.name for pair in found] == [
        "7b-awq-qvl-against-bf16",
        "2b-awq-qvl-against-bf16",
        "7b-awq-qvl-against-awq",
        "2b-awq-qvl-against-awq",
    ]
    assert [pair.rates for pair in found] == [True, True, False, False]
    assert not any(pair.rates for pair in card.pairs([card.SHAPES["7b"]], rates=False))


def test_a_head_in_4_bits_is_the_fourth_system() -> None:
    """It is held against 16 bits at every load, against vLLM's choice up to 32, against ours without it up to 8."""
    (shape,) = card.asked_for(CardSettings(shapes="7b", systems="bf16,awq,awq-qvl,awq-qvl-head"))
    found = {pair.name: pair.concurrency for pair in card.pairs([shape], rates=False)}
    assert found == {
        "7b-awq-qvl-head-against-bf16": "1,8,32,128",
        "7b-awq-qvl-head-against-awq": "1,8,32",
        "7b-awq-qvl-head-against-awq-qvl": "1,8",
    }


def test_less_is_measured_where_less_is_asked_for() -> None:
    """A report needs both of its systems; the loads are those that were given."""
    (shape,) = card.asked_for(CardSettings(shapes="qwen2.5-vl-3b", systems="bf16,awq-qvl", concurrency="1,8"))
    assert [pair.name for pair in card.pairs([shape])] == ["qwen2.5-vl-3b-awq-qvl-against-bf16"]
    assert card.asked_for(CardSettings(shapes="7b", seconds=1.2))[0].seconds == 1.2
    assert shape.concurrency == "1,8" and card.SHAPES["qwen2.5-vl-3b"].concurrency == "1,8,32,128"
    with pytest.raises(BenchError, match="--systems: fp8 is none of bf16, awq-qvl, awq, awq-qvl-head"):
        card.asked_for(CardSettings(shapes="7b", systems="fp8"))
    with pytest.raises(BenchError, match="--shapes: '8b' is none of"):
        card.asked_for(CardSettings(shapes="7b,8b"))


def test_a_run_that_was_interrupted_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole report is left alone; one that is partial, or was killed before it was written, is asked to resume."""
    whole, partial, killed = tmp_path / "7b-awq-qvl-against-bf16", tmp_path / "2b-awq-qvl-against-bf16", "2b-awq-qvl"
    shutil.copytree(H100 / whole.name, whole)
    shutil.copytree(H100 / partial.name, partial)
    report = json.loads((partial / "report.json").read_text())
    (partial / "report.json").write_text(json.dumps({**report, "status": "partial"}))
    (tmp_path / f"{killed}-against-awq").mkdir()
    asked: dict[str, list[str]] = {}

    def run(command: list[object], module: str = "toolkit.cli") -> int:
        words = [str(word) for word in command]
        asked[Path(words[words.index("--out") + 1]).name] = words
        return 0

    monkeypatch.setattr(commands, "run", run)
    assert exit_code(app, "gpu-figures", "measure", "--work", tmp_path / "work", "--out", tmp_path) == 0
    resumed = {name: "--resume" in words for name, words in asked.items()}
    assert resumed == {
        "2b-awq-qvl-against-bf16": True,
        "7b-awq-qvl-against-awq": False,
        "2b-awq-qvl-against-awq": True,
        "agreement.json": False,
    }


def test_an_unknown_shape_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(app, "gpu-figures", "up", "--shapes", "7b,9b", "--work", tmp_path, "--out", tmp_path) == 2
    assert "'9b' is none of 7b, 2b" in capsys.readouterr().err


def test_a_step_without_its_checkpoints_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(app, "gpu-figures", "up", "--shapes", "tiny", "--work", tmp_path, "--out", tmp_path) == 2
    assert "no such directory" in capsys.readouterr().err
