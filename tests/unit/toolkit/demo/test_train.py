from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.demo import train
from toolkit.demo.feed import SIZES, TRAIN_TASKS, Feed, FeedSettings
from toolkit.demo.learn import Rates
from toolkit.demo.optim import Muon, orthogonalize, split_parameters
from toolkit.demo.prompt import END, PAD, answer_text, pack
from toolkit.errors import CheckpointError, QvlError, ResourceError
from toolkit.paths import demo_checkpoint
from toolkit.tasks.questions import SIDES

#: Newer Pythons warn of what these workers do not do: take a lock that a thread of the parent held.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    """Put back what training sets for the whole process; one thread, since many wait for each other when busy."""
    threads, precision, state = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_rng_state()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.set_rng_state(state)
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.mark.slow
@FORKS
def test_a_few_steps_make_a_whole_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    train.main(out, 2.0, 1, "cpu", smoke=True)
    assert capsys.readouterr().out.strip() == str(out)
    Checkpoint.open(out)
    facts = json.loads((out / "training.json").read_text())
    assert facts["steps"] == 3 and 0 < facts["samples"] <= 36
    assert [row["step"] for row in facts["curve"]] == [1, 2, 3]
    assert all(0 < row["loss"] < 20 for row in facts["curve"])
    assert facts["seeds"] == {"train": 1, "test_while_training": 777, "final_test": 4242}
    assert set(facts["accuracy"]) >= set(json.loads((out / "accuracy.json").read_text())["accuracy"])
    assert "# The embedded Qwen2-VL" in (out / "README.md").read_text()
    assert not (out / "curve.json").exists() and not list(out.glob("*.part"))


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf])
def test_a_time_that_cannot_be_trained_for(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(QvlError, match="--minutes"):
        train.main(tmp_path / "out", minutes, 1, "cpu")
    assert not (tmp_path / "out").exists()


def test_devices_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="use --device cpu"):
        train.main(tmp_path / "out", 1, 1, "cuda")
    with pytest.raises(ResourceError, match="unknown device 'tpu'"):
        train.main(tmp_path / "out", 1, 1, "tpu")
    assert not (tmp_path / "out").exists()


def test_another_models_weights_are_left_alone(tmp_path: Path) -> None:
    weights = tmp_path / "model-00001-of-00002.safetensors"
    weights.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="choose another --out"):
        train.main(tmp_path, 1, 1, "cpu")
    assert weights.read_bytes() == b"precious"


def test_the_forecast_follows_from_the_shipped_record() -> None:
    samples = json.loads((demo_checkpoint() / "training.json").read_text())["samples"]
    told = train._forecast(rate=samples / 3600 / 50, seconds=1800)
    assert "50 hours here (--minutes 3000)" in told
    assert "ends after 30 minutes, with about 1% of them" in told
    assert f"{samples:,} questions" in train._shipped_time()


def test_a_curve_is_thinned_evenly_up_to_its_last_point() -> None:
    curve = [
        {"seconds": i, "step": i, "loss": 1.0, "samples_per_second": 9, "rate": 1.0, "tasks": {}} for i in range(100)
    ]
    thin = train._thin(curve)
    steps = [row["step"] for row in thin]
    assert len(steps) == 34 and steps[-1] == 99 and {b - a for a, b in itertools.pairwise(steps)} == {3}
    assert "tasks" not in thin[0]
    assert train._thin([]) == [] and len(train._thin(curve[:5])) == 5


@FORKS
def test_batches_come_from_the_training_split_and_slots_go_round() -> None:
    feed = Feed(FeedSettings(seed=3, workers=1, slots=2, patches=1_200, most=5))
    try:
        for _ in range(6):
            batch = feed.get(timeout=30)
            shape = batch.shape
            assert batch.pixels.shape == (shape.batch, shape.height, shape.width, 3)
            assert batch.packed.ids.shape == batch.packed.predicts.shape == (shape.batch, shape.length)
            assert (shape.width, shape.height) in (*SIZES, (0, 0))
            assert all("unseen" not in TRAIN_TASKS[task] for task in batch.tasks)
            feed.release(batch)
    finally:
        feed.close()
    assert {w for w, _ in SIZES} == {h for _, h in SIZES} == set(SIDES)


@FORKS
def test_a_worker_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr(Feed, "_draw", broken)
    feed = Feed(FeedSettings(seed=3, workers=1, slots=2, patches=1_200, most=5))
    try:
        feed._workers[0].join(20)
        with pytest.raises(RuntimeError, match="died"):
            feed.get(timeout=0.2)
    finally:
        feed.close()


def test_answers_and_their_ends_are_what_is_predicted() -> None:
    packed = pack(["Read the word.", "What number is written?"], ["lamp", "40571"], length=40)
    for row, answer in enumerate(("lamp", "40571")):
        targets = [int(packed.ids[row, at + 1]) for at in range(39) if packed.predicts[row, at]]
        assert targets[-1] == END and PAD not in targets
        assert answer_text(targets) == answer
        assert packed.ids[row, packed.starts[row]] == targets[0]
    assert not pack(["Read the word."], None).predicts.any()
    with pytest.raises(ValueError, match="does not fit 12"):
        pack(["Read the word."], ["lamp"], length=12)


def test_rates_warm_up_stay_flat_and_end_at_zero() -> None:
    rates = Rates(warmup_steps=10, flat_share=0.5)
    assert rates.factor(0, 0.0) == 0.1 and rates.factor(9, 0.1) == rates.factor(99, 0.49) == 1.0
    assert rates.factor(99, 0.75) == pytest.approx(0.5) and rates.factor(99, 1.0) == rates.factor(99, 1.5) == 0.0


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16)])
def test_muons_step_is_nearly_orthogonal(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_finds_a_linear_map_and_leaves_embeddings_to_adamw() -> None:
    from toolkit.demo.model import TinyQwen2VL

    matrices, rest = split_parameters(TinyQwen2VL())
    assert len(matrices) + len(rest) == 129
    assert all(p.dim() == 2 for p in matrices) and max(p.shape[0] for p in matrices) < 1024
    rng = torch.Generator().manual_seed(0)
    wanted, inputs = torch.randn(8, 8, generator=rng), torch.randn(64, 8, generator=rng)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    muon = Muon([weight], weight_decay=0.0)
    first = loss = 0.0
    for step in range(200):
        error = ((inputs @ weight.T - inputs @ wanted.T) ** 2).mean()
        loss = error.item()
        first = first if step else loss
        (weight.grad,) = torch.autograd.grad(error, weight)
        muon.step(0.2 * (1 - step / 200))
    assert loss < 0.01 * first
