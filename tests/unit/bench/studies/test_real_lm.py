"""The study of real weights: texts that do not overlap, ways by name, ratios that are paired, a loop that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.studies.real_lm import study
from bench.studies.real_lm.page import ratio, write_page
from bench.studies.real_lm.score import Pair, Score
from bench.studies.real_lm.texts import read_held, write_texts
from bench.studies.real_lm.ways import changed, recipe_of
from bench.studies.settings import RealLmSettings
from toolkit.calibration.manifest import read_manifest
from toolkit.errors import FormatError, ManifestError
from toolkit.paths import demo_checkpoint
from toolkit.quantize import Recipe, quantize


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for i in range(6):
        (tmp_path / "src" / f"p{i}").mkdir(parents=True)
        (tmp_path / "src" / f"p{i}" / "code.py").write_text("".join(f"line_{i}_{n} = {n}\n" for n in range(900)))
    (tmp_path / "src" / "template.py").write_text("<|im_start|>" * 1000)
    (tmp_path / "src" / "short.py").write_text("pass\n")
    return tmp_path / "src"


def test_chats_and_held_texts_come_of_different_files(files: Path, tmp_path: Path) -> None:
    calib, held = write_texts(tmp_path / "out", files)
    chats = read_manifest(calib)
    said = [json.dumps(chat.messages) for chat in chats]
    texts = read_held(held)
    assert len(texts) in (3, 4) and len(chats) > 6
    own = {text.split("\n")[3].split(" = ")[0].rsplit("_", 1)[0] for text in texts}
    assert len(own) == len(texts)
    assert not any(f"{name}_" in chat for name in own for chat in said)
    assert len(set(said)) == len(said) and "im_start" not in "".join([*said, *texts])
    assert write_texts(tmp_path / "again", files)[0].read_bytes() == calib.read_bytes()
    with pytest.raises(ManifestError, match="at least 4 needed"):
        write_texts(tmp_path / "none", tmp_path / "out")


def test_a_ways_name_is_a_recipe() -> None:
    assert recipe_of("best+g64+noclip") == {"effort": "best", "group_size": 64, "clip": False}
    assert recipe_of("best+head") == {"effort": "best", "lm_head": True}
    assert Recipe(**recipe_of("autoawq+n32")).samples == 32
    assert Recipe(**recipe_of("best")).samples == 512 and Recipe(**recipe_of("best")).distill
    assert not Recipe(**recipe_of("best+nodistill")).distill and Recipe(**recipe_of("fast+distill")).distill
    for unknown in ("worst", "fast+nodescent", "fast+g", "fast+x64", "+g64"):
        with pytest.raises(FormatError, match="unknown way"):
            recipe_of(unknown)


def test_pieces_of_the_best_effort_are_changed_in_the_block_alone() -> None:
    from toolkit.quantize.search import chained

    before = chained.RESIDUAL, chained._ROUNDS
    assert recipe_of("best+residual+nodescent+g64") == {"effort": "best", "group_size": 64}
    with changed("best+residual+nodescent+g64"):
        assert chained.RESIDUAL and chained._ROUNDS == chained._SWEEPS == 0
    assert before == (chained.RESIDUAL, chained._ROUNDS)


def test_ratios_are_of_pairs() -> None:
    rng = np.random.default_rng(1)
    base = np.exp(rng.normal(size=200))
    means, geo = ratio(base * 0.5 * np.exp(0.1 * rng.normal(size=200)), base)
    for found in (means, geo):
        assert found.low < 0.5 < found.high and found.high - found.low < 0.05
        assert found.low <= found.value <= found.high


def score_of(kl: float) -> Score:
    return Score([kl, 2 * kl], 3 * kl, 0.9, [1.0, 1.2], [1.0, 1.1])


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Play quantizing and measuring; returns what was done."""
    done: list[tuple[str, int]] = []

    class Played:
        def __init__(self, *_: Any) -> None: ...

        def score(self, tokens: torch.Tensor) -> Score:
            return score_of(0.01 * len(done))

    def one(pair: Any, way: str, seed: int, settings: RealLmSettings) -> dict[str, Any]:
        done.append((way, seed))
        return {"seconds": 10.0}

    monkeypatch.setattr(study, "Pair", Played)
    monkeypatch.setattr(study, "_one", one)
    monkeypatch.setattr(study, "cut", lambda *_: [torch.zeros(2, 512)] * 2)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_: None)
    (tmp_path / "held.jsonl").write_text('{"text": "x"}\n')
    return done


def test_what_is_measured_is_not_measured_again(tmp_path: Path, played: list[tuple[str, int]]) -> None:
    settings = RealLmSettings(model=tmp_path, out=tmp_path, ways="rtn,autoawq,best", seeds=2)
    study.run("measure", settings.replaced(minutes=0.0))
    assert not played
    study.run("measure", settings.replaced(ways="rtn,autoawq"))
    study.run("measure", settings)
    assert played == [("rtn", 0), ("autoawq", 0), ("autoawq", 1), ("best", 0), ("best", 1)]
    study.run("measure", settings.replaced(ways="best,peer=/some/where"))
    study.run("measure", settings.replaced(ways="peer=/some/where"))
    assert played[5:] == [("peer=/some/where", 0)]
    page = (tmp_path / "README.md").read_text()
    assert "| peer | 1 | " in page
    assert "| best | 2 | 0.06750 (0.06000 0.07500) |" in page
    assert "to autoawq, means" in page and "4 held-out sequences" in page
    (tmp_path / "README.md").unlink()
    write_page(tmp_path)
    assert (tmp_path / "README.md").read_text() == page
    with pytest.raises(FormatError, match="unknown way 'bets'"):
        study.run("measure", settings.replaced(ways="bets"))


@pytest.mark.slow
def test_what_is_scored_is_what_the_checkpoint_holds(tmp_path: Path) -> None:
    """The embedded model: its source has no divergence, one way leaves nothing behind in the next."""
    pair = Pair(demo_checkpoint(), torch.device("cpu"))
    tokens = torch.randint(5, 900, (3, 512), generator=torch.Generator().manual_seed(0))
    same = pair.score(tokens)
    assert max(same.kl) < 1e-9 and same.top1 == 1 and same.loss == same.source_loss
    pair.nearest(128)
    nearest = pair.score(tokens)
    assert min(nearest.kl) > 1e-5 and nearest.p99 > max(nearest.kl) and 0.5 < nearest.top1 < 1
    out = quantize("demo", tmp_path / "awq", samples=2, lm_head=True, verdict=False)
    pair.take(out)
    whole = pair.score(tokens)
    assert whole.kl != nearest.kl
    pair._end(pair.source.model.language_model.norm.weight, pair.source.lm_head.weight)
    assert sum(pair.score(tokens).kl) < sum(whole.kl)  # the head in four bits costs something by itself
    pair.nearest(128)
    assert pair.score(tokens) == nearest
