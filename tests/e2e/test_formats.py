"""The real vLLM serves LoRA adapters, on fp16 and AWQ, and answers as the merged model does."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from serve.process.lifecycle import Server, start
from serve.settings.config import ServeOptions
from serve.settings.lora import Lora
from tests.e2e.conftest import Question, chat, free_port
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.paths import demo_checkpoint
from toolkit.sources.adapter import merge

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of random weights, made by peft, large enough to change what the embedded model says."""
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_pretrained(demo_checkpoint(), dtype=torch.float32)
    targets = r".*language_model.*\.(q_proj|v_proj|down_proj)"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(base, config)
    out = tmp_path_factory.mktemp("lora") / "adapter"
    model.save_pretrained(str(out))
    return out


def first_logprobs(server: Server, question: Question, model: str) -> dict[str, float]:
    first = chat(server, question, model=model, max_tokens=1, logprobs=True, top_logprobs=5)["logprobs"]["content"][0]
    return {entry["token"]: entry["logprob"] for entry in first["top_logprobs"]}


def test_an_adapter_answers_as_the_merged_model_does(adapter: Path, questions: list[Question], tmp_path: Path) -> None:
    sample = questions[::4]
    merged = merge(Checkpoint.open(demo_checkpoint()), adapter, tmp_path / "merged")
    with start(str(merged), ServeOptions(port=free_port(), timeout=180)) as server:
        expected = [first_logprobs(server, question, "merged") for question in sample]
    lora = Lora.parse(f"random={adapter}")
    with start("demo", ServeOptions(port=free_port(), timeout=180, loras=(lora,))) as server:
        listed = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]
        assert [model["id"] for model in listed] == ["demo", "random"]
        changed = 0
        for question, wanted in zip(sample, expected, strict=True):
            seen = first_logprobs(server, question, "random")
            likeliest = max(wanted, key=lambda token: wanted[token])
            assert seen[likeliest] == pytest.approx(wanted[likeliest], abs=2e-2), question
            changed += first_logprobs(server, question, "demo") != seen
        assert changed == len(sample)


def test_an_adapter_changes_what_awq_weights_answer(adapter: Path, awq_gemm: Path, questions: list[Question]) -> None:
    lora = Lora.parse(f"random={adapter}")
    with start(str(awq_gemm), ServeOptions(port=free_port(), timeout=180, loras=(lora,))) as server:
        for question in questions[::4]:
            assert first_logprobs(server, question, "random") != first_logprobs(server, question, server.model_name)
