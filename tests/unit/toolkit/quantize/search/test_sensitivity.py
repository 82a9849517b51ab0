"""Gradients taken layer by layer are those of the whole model; token weights."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.short import calibration, short_demo
from toolkit.calibration.inputs import PreparedSample, prepare
from toolkit.calibration.manifest import read_manifest
from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.compat import patch_torchvision
from toolkit.errors import QvlError
from toolkit.quantize.search import sensitivity
from toolkit.quantize.search.sensitivity import measure, token_weights

CPU = torch.device("cpu")
LAYERS = 4


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(short_demo(tmp_path_factory.mktemp("sensitivity") / "short", layers=LAYERS))


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory, source: Checkpoint) -> list[PreparedSample]:
    """A text-only chat, three images asked about and answered, one not answered, one asked about twice."""
    directory = tmp_path_factory.mktemp("sensitivity-calibration")
    lines = [json.loads(line) for line in calibration(directory).read_text(encoding="utf-8").splitlines()]
    question, answer = lines[1]["messages"]
    lines.append({"messages": [question]})
    again = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "blue"}]
    lines.append({"messages": [question, answer, *again]})
    return prepared(directory, source, lines)


def prepared(directory: Path, source: Checkpoint, lines: Sequence[dict[str, Any]]) -> list[PreparedSample]:
    patch_torchvision()
    from transformers import AutoProcessor

    path = directory / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    processor = AutoProcessor.from_pretrained(source.path)
    return list(prepare(read_manifest(path), processor, max_tokens=4096, max_pixels=None))


def labels(source: Checkpoint, sample: PreparedSample) -> torch.Tensor:
    """What is predicted, found in the text: each answer up to its end token, or all that is no image."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path)
    ids = sample.inputs["input_ids"]
    pieces = tokenizer.decode(ids[0]).split("<|im_start|>assistant\n")
    found = torch.full_like(ids, -100)
    if len(pieces) == 1:
        image = torch.tensor([source.config["image_token_id"], source.config["video_token_id"]])
        return torch.where(torch.isin(ids, image), found, ids)
    at = len(tokenizer.encode(pieces[0]))
    for piece in pieces[1:]:
        at += len(tokenizer.encode("<|im_start|>assistant\n"))
        answer = len(tokenizer.encode(piece[: piece.index("<|im_end|>")])) + 1
        found[0, at : at + answer] = ids[0, at : at + answer]
        at += len(tokenizer.encode(piece))
    assert at == ids.shape[1]
    return found


def by_autograd(source: Checkpoint, samples: Sequence[PreparedSample]) -> list[float]:
    """The ratios from the whole model and transformers' own loss, none below the median."""
    from transformers import Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(source.path, dtype=torch.float32).eval()
    text, vision = torch.zeros(2, LAYERS, 2, dtype=torch.float64)
    for sample in samples:
        outputs: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _, __, y, kept=outputs: kept.append(y))
            for layer in model.model.language_model.layers
        ]
        loss = model(**sample.inputs, labels=labels(source, sample), use_cache=False).loss
        for hook in hooks:
            hook.remove()
        image = sample.inputs["input_ids"][0] == source.config["image_token_id"]
        for index, gradient in enumerate(torch.autograd.grad(loss, outputs)):
            sizes = gradient[0].abs()
            vision[index] += torch.tensor([sizes[image].sum(), sizes[image].numel()])
            text[index] += torch.tensor([sizes[~image].sum(), sizes[~image].numel()])
    means_v, means_t = (sums[:, 0] / sums[:, 1] for sums in (vision, text))
    ratios: list[float] = (means_v / means_t).tolist()
    return [max(ratio, statistics.median(ratios)) for ratio in ratios]


@pytest.mark.parametrize("pieces", [(2048, 4096, 8192), (100, 300, 7)], ids=["at once", "in pieces"])
def test_ratios_are_those_of_the_whole_model(
    source: Checkpoint, samples: list[PreparedSample], monkeypatch: pytest.MonkeyPatch, pieces: tuple[int, int, int]
) -> None:
    for name, value in zip(("_TOKENS", "_VOCABULARY", "_POSITIONS"), pieces, strict=True):
        monkeypatch.setattr(sensitivity, name, value)
    steps: list[int] = []
    found = measure(source, samples, CPU, on_step=steps.append)
    assert found == pytest.approx(by_autograd(source, samples[1:]), rel=1e-3)
    assert steps == list(range(1, 2 * LAYERS + 1))


def test_an_output_head_of_its_own(tmp_path: Path, source: Checkpoint, samples: list[PreparedSample]) -> None:
    with CheckpointWriter(tmp_path / "untied") as writer:
        for name in source.tensors:
            writer.add(name, source.get(name))
        rows = torch.randperm(1024, generator=torch.Generator().manual_seed(0))
        writer.add("lm_head.weight", source.get(f"{source.language_prefix}embed_tokens.weight")[rows])
        writer.copy_side_files(source.path)
        writer.set_config({**source.config, "tie_word_embeddings": False})
    untied = Checkpoint.open(tmp_path / "untied")
    found = measure(untied, samples, CPU)
    assert found == pytest.approx(by_autograd(untied, samples[1:]), rel=1e-3)
    assert found != pytest.approx(measure(source, samples, CPU), rel=0.01)


def test_the_first_samples_with_images_are_taken(source: Checkpoint, samples: list[PreparedSample]) -> None:
    assert measure(source, samples, CPU, limit=2) == measure(source, samples[1:3], CPU)
    assert measure(source, samples, CPU, limit=2) != measure(source, samples, CPU, limit=3)


def test_no_more_samples_are_taken_than_fit(
    source: Checkpoint, samples: list[PreparedSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, *_ = (sample.tokens for sample in samples[1:])
    expected = [measure(source, samples[1 : 1 + count], CPU) for count in (1, 2)]
    for most, found in ((1, expected[0]), (first + second - 1, expected[0]), (first + second, expected[1])):
        monkeypatch.setattr(sensitivity, "_MOST_TOKENS", most)
        assert measure(source, samples, CPU) == found


def test_text_alone_cannot_be_balanced(source: Checkpoint, samples: list[PreparedSample]) -> None:
    with pytest.raises(QvlError, match="no calibration sample has an image or video"):
        measure(source, samples[:1], CPU)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0, 3.5])
def test_token_weights_have_mean_1_and_the_gradients_ratio_squared(ratio: float) -> None:
    vision = torch.rand(500, generator=torch.Generator().manual_seed(0)) < 0.7
    weights = token_weights(vision, ratio)
    assert weights.shape == (500,) and float(weights.mean()) == pytest.approx(1, rel=1e-5)
    assert float(weights[vision][0]) == pytest.approx(ratio**2 * float(weights[~vision][0]))
    assert weights[vision].unique().numel() == weights[~vision].unique().numel() == 1
