from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.demo import gallery
from toolkit.demo.evaluate import EVALUATION_SEED, Reader, evaluate
from toolkit.demo.export import MAX_BYTES, config, export
from toolkit.demo.model import TinyQwen2VL, normalize
from toolkit.demo.model_card import card
from toolkit.demo.prompt import pack, prefix
from toolkit.demo.quiz import Score, decode, score
from toolkit.demo.record import read_record, write_record
from toolkit.errors import CheckpointError, ManifestError
from toolkit.paths import demo_checkpoint
from toolkit.tasks import questions

WEIGHTS = demo_checkpoint() / "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of small kernels wait for each other on a busy machine, several times as long as they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader(demo_checkpoint(), "cpu")


@pytest.fixture(scope="module")
def fast() -> TinyQwen2VL:
    model = TinyQwen2VL()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model.eval()


# ---- the fast model ----


@pytest.mark.parametrize("size", [(224, 224), (112, 308), (336, 140)])
def test_the_fast_model_equals_transformers(reader: Reader, fast: TinyQwen2VL, size: tuple[int, int]) -> None:
    for task in ("counting", "words", "where"):
        image = questions.question(task, "held-out", 11, 0, size)
        inputs = reader.inputs([image])
        packed = pack([image.question], None)
        before = torch.tensor(prefix(True))
        merged = size[0] * size[1] // 28**2
        ids = [*before.tolist(), *[1022] * merged, *packed.ids[0].tolist()]
        assert inputs["input_ids"][0].tolist() == ids
        pixels = torch.from_numpy(np.asarray(image.image).copy())[None]
        with torch.inference_mode():
            expected = reader.network(**inputs).logits[:, -packed.ids.shape[1] :]
            encoded = fast.encode(normalize(pixels))
            assert encoded.shape == (1, merged, 256)
            grid = (size[1] // 28, size[0] // 28)
            logits = fast(before, encoded, grid, torch.from_numpy(packed.ids))
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-3)


def test_the_fast_model_equals_transformers_without_an_image(reader: Reader, fast: TinyQwen2VL) -> None:
    packed = pack(["Spell the word lamp."], None, image=False)
    before = torch.tensor(prefix(False))
    ids = torch.cat([before[None], torch.from_numpy(packed.ids)], 1)
    with torch.inference_mode():
        expected = reader.network(input_ids=ids).logits[:, len(before) :]
        logits = fast(before, None, (0, 0), torch.from_numpy(packed.ids))
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.slow
def test_decoding_a_batch_answers_as_generate_does(reader: Reader, fast: TinyQwen2VL) -> None:
    tasks = ("counting", "words", "bars", "bar_list")
    asked = [questions.question(task, "held-out", 21, i, (224, 168)) for task in tasks for i in range(2)]
    assert decode(fast, asked) == reader.ask(asked)
    counted = score(fast, {(224, 168): asked}, chunk=5)
    assert sum(n for _, n in counted.right.values()) == len(asked)
    assert set(counted.right) == set(tasks)


# ---- what ships ----


@pytest.mark.slow
def test_the_shipped_model_answers(reader: Reader) -> None:
    asked = [questions.question(task, "held-out", EVALUATION_SEED, i) for task in questions.TASKS for i in range(12)]
    result = Score()
    for image, answer in zip(asked, reader.ask(asked, batch=24), strict=True):
        result.add(image, answer)
    assert set(result.accuracy()) == set(questions.TASKS)
    assert min(result.accuracy().values()) >= 0.9, result.wrong


def test_the_shipped_model_counts_what_make_ask_shows(reader: Reader) -> None:
    assert reader.ask([gallery.shapes_image()]) == ["5"]


def test_the_shipped_files_are_whole_and_small() -> None:
    assert WEIGHTS.stat().st_size <= MAX_BYTES
    checkpoint = Checkpoint.open(demo_checkpoint())
    assert checkpoint.quantization is None
    assert {info.dtype for info in checkpoint.tensors.values()} == {"F16"}
    assert json.loads((demo_checkpoint() / "config.json").read_text()) == config()
    shapes = {name: tuple(value.shape) for name, value in TinyQwen2VL().state_dict().items()}
    assert {name: tuple(info.shape) for name, info in checkpoint.tensors.items()} == shapes


def test_the_records_belong_to_the_shipped_weights() -> None:
    training, accuracy = (read_record(demo_checkpoint() / name) for name in ("training.json", "accuracy.json"))
    assert training["parameters"] == sum(value.numel() for value in load_file(WEIGHTS).values())
    assert set(accuracy["accuracy"]) == set(questions.TASKS) <= set(training["accuracy"])
    assert min(accuracy["accuracy"].values()) >= 0.9 and min(accuracy["questions"].values()) >= 100
    seeds = {*training["seeds"].values(), accuracy["seed"]}
    assert len(seeds) == 4 and accuracy["seed"] == EVALUATION_SEED


def test_the_card_is_what_the_records_say() -> None:
    text = (demo_checkpoint() / "README.md").read_text(encoding="utf-8")
    assert text == card(demo_checkpoint()), "run python -m toolkit.demo.model_card"
    for task, share in read_record(demo_checkpoint() / "accuracy.json")["accuracy"].items():
        assert any(line.startswith(f"| {task} |") and f" {share:.1%} |" in line for line in text.splitlines())


def test_a_card_needs_its_records(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"training\.json does not exist: qvl demo-model"):
        card(tmp_path)
    for content, message in (("{", "is not JSON"), ("[1]", "is not a JSON object")):
        (tmp_path / "training.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            card(tmp_path)


def test_records_read_as_they_were_written(tmp_path: Path) -> None:
    facts = {"short": {"a": 1, "b": [1, 2]}, "empty": [], "long": [{"word": "x" * 50, "n": i} for i in range(9)]}
    write_record(tmp_path / "r.json", facts)
    assert read_record(tmp_path / "r.json") == facts
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert len(lines) == 2 + 2 + 11 and max(map(len, lines)) <= 120


# ---- export and evaluation ----


def test_exporting_makes_a_checkpoint(tmp_path: Path) -> None:
    export(WEIGHTS, tmp_path / "out")
    assert Checkpoint.open(tmp_path / "out").content_hash() == Checkpoint.open(demo_checkpoint()).content_hash()
    shipped = {p.name for p in demo_checkpoint().iterdir()} - {"README.md", "training.json", "accuracy.json"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == shipped


def test_weights_that_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: train first"):
        export(tmp_path / "none.safetensors", tmp_path / "out")
    weights = load_file(WEIGHTS)
    name = "model.norm.weight"
    for wrong, message in (
        ({**weights, name: weights[name].float()}, r"not this model in fp16: dtypes \['F16', 'F32'\]"),
        ({**weights, name: weights[name][:5].clone()}, r"differing \['model\.norm\.weight'\]"),
        ({k: v for k, v in weights.items() if k != name}, r"differing \['model\.norm\.weight'\]"),
        ({**weights, "extra": torch.zeros(600_000).half()}, "more than the 12000000 that may ship"),
    ):
        save_file(wrong, tmp_path / "wrong.safetensors")
        with pytest.raises(CheckpointError, match=message):
            export(tmp_path / "wrong.safetensors", tmp_path / "out")
    (tmp_path / "wrong.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header....")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        export(tmp_path / "wrong.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="ask at least one"):
        evaluate(demo_checkpoint(), per_task=0)
    with pytest.raises(CheckpointError):
        Reader(tmp_path / "nothing")
    quantized = tmp_path / "awq"
    shutil.copytree(demo_checkpoint(), quantized)
    settings = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}
    (quantized / "config.json").write_text(json.dumps({**config(), "quantization_config": settings}))
    with pytest.raises(CheckpointError):
        Reader(quantized)
