"""The real vLLM serves each family's AWQ checkpoint, and answers as transformers does with the same weights.

On tiny models of random weights: what they say means nothing, so it tells more than a trained model's would of a tensor
that went to the wrong place. A question counts where transformers is sure of each token: where no other is near.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from bench.studies.sharing import beside_others
from serve.http.images import image_url
from serve.process.lifecycle import Server, start
from serve.settings.config import ServerConfig
from serve.settings.engine import EngineSettings
from tests.e2e.conftest import BOOT_SECONDS, free_port, once
from tests.support import chats, reference
from tests.support.short import calibration
from toolkit.compat import patch_torchvision
from toolkit.models.qwen2_5_vl import QWEN2_5_VL
from toolkit.models.qwen3_vl import QWEN3_VL
from toolkit.quantize import quantize
from toolkit.sources.random_model import write_random_model

pytestmark = pytest.mark.e2e

TOKENS = 16
#: The context has room for an image of that many pixels, and for each of these tests'.
ROOM = EngineSettings(max_pixels=512 * 28 * 28)
#: Least lead of a token in logits, whose spread is about one. float16 leaves 0.001 to 0.002 open (root mean square).
CLEAR = 0.02
#: Images in pixels: one token's side, less than a window, more than a window, a strip.
SIZES = ((32, 32), (84, 112), (224, 308), (400, 90))
WORDS = ("What is it?", "Count the blue squares.", "Read the sign", "And now?")


#: The second family goes the same way through the server; before a release, it too.
SERVED = [pytest.param(QWEN2_5_VL, id="qwen2_5_vl"), pytest.param(QWEN3_VL, id="qwen3_vl", marks=pytest.mark.release)]


@pytest.fixture(scope="module", params=SERVED)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny random model of a family and its AWQ checkpoint."""
    title = request.param.title.lower()
    source = once(tmp_path_factory, f"{title}-tiny", lambda out: write_random_model(f"{title}-tiny", out))
    manifest = once(tmp_path_factory, "random-chats", lambda out: calibration(out, 8)) / "calib.jsonl"
    made = once(tmp_path_factory, f"{title}-awq", lambda out: quantize(str(source), out, calib=str(manifest)))
    return source, made


def greedy(model: Any, path: Path, image: Path, question: str) -> tuple[list[int], float]:
    """Return the tokens that transformers answers, and the least lead of one of them over the next in logits."""
    patch_torchvision()
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(path)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    with Image.open(image) as opened:
        inputs = processor(images=[opened.convert("RGB")], text=[text], return_tensors="pt")
    made = model.generate(
        **inputs,
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.logits)[:, 0].topk(2).values
    return made.sequences[0, -TOKENS:].tolist(), float((best[:, 0] - best[:, 1]).min())


def answered(server: Server, image: Path, question: str) -> list[int]:
    """Return the tokens that the server answers."""
    content = [
        {"type": "image_url", "image_url": {"url": image_url(str(image))}},
        {"type": "text", "text": question},
    ]
    body = {
        "model": server.model_name,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


@pytest.mark.supports("qwen2_5_vl", "gemm", "vllm", "CPU")
@pytest.mark.supports("qwen3_vl", "gemm", "vllm", "CPU")
@pytest.mark.supports("qwen3_vl", "gemm", "transformers", "CPU")
@pytest.mark.supports("qwen2_5_vl", "gemm", "transformers", "CPU")
def test_answers_are_those_of_transformers_token_by_token(pair: tuple[Path, Path], tmp_path: Path) -> None:
    _, made = pair
    model = reference.load(made)
    images = [tmp_path / chats.noise(tmp_path, *size) for size in SIZES]
    asked = [(image, words) for image in images for words in WORDS]
    expected = {each: greedy(model, made, *each) for each in asked}
    clear = {each: tokens for each, (tokens, lead) in expected.items() if lead > CLEAR}
    assert len(clear) >= 4 and len({image for image, _ in clear}) >= 2, [lead for _, lead in expected.values()]
    assert len({tuple(tokens) for tokens in clear.values()}) > 2
    options = ServerConfig(port=free_port(), timeout=BOOT_SECONDS, dtype="float16", settings=ROOM)
    with start(str(made), beside_others(made, options, kv_gib=0.25)) as server:
        assert {each: answered(server, *each) for each in clear} == clear


def test_quantizing_worked(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The divergence from the 16-bit source is small, and far below that of scales of the wrong groups."""
    source, made = pair
    samples = chats.inputs(source, tmp_path)
    true = reference.load(source)
    ours = reference.divergence(true, reference.load(made), samples)
    broken = reference.divergence(true, reference.load(made, lambda _, scales: scales.roll(1, 1)), samples)
    assert 0 < ours < 0.05
    assert ours < broken / 10
