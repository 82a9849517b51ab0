"""The real vLLM serves LoRA adapters, on fp16 and AWQ, and answers as the merged model does."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from serve.settings.config import ServerConfig
from serve.settings.lora import Lora
from tests.e2e.conftest import BOOT_SECONDS, Question, booted, free_port, top_logprobs
from tests.e2e.test_serve import answers, reference_logprobs, share_right
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


def test_an_adapter_answers_as_the_merged_model_does(adapter: Path, questions: list[Question], tmp_path: Path) -> None:
    sample = questions[::4]
    merged = merge(Checkpoint.open(demo_checkpoint()), adapter, tmp_path / "merged")
    expected = reference_logprobs(merged, sample)  # which vLLM agrees with: test_serve.py
    lora = Lora.parse(f"random={adapter}")
    with booted("demo", ServerConfig(port=free_port(), timeout=BOOT_SECONDS, loras=(lora,))) as server:
        listed = httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]
        assert [model["id"] for model in listed] == ["demo", "random"]
        changed = 0
        for question, wanted in zip(sample, expected, strict=True):
            seen = top_logprobs(server, question, model="random")
            likeliest = max(wanted, key=lambda token: wanted[token])
            assert seen[likeliest] == pytest.approx(wanted[likeliest], abs=3e-2), question
            changed += top_logprobs(server, question, model="demo") != seen
        assert changed == len(sample)


def test_awq_weights_in_bfloat16_answer_as_well_and_an_adapter_changes_it(
    adapter: Path, awq_gemm: Path, questions: list[Question]
) -> None:
    """fp16 weights in bfloat16: test_ready.py."""
    options = ServerConfig(
        port=free_port(), timeout=BOOT_SECONDS, dtype="bfloat16", loras=(Lora.parse(f"random={adapter}"),)
    )
    with booted(awq_gemm, options) as server:
        given = answers(server, questions)
        assert share_right(questions, given) >= 0.75, list(zip([q.answers for q in questions], given, strict=True))
        for question in questions[::4]:
            assert top_logprobs(server, question, model="random") != top_logprobs(server, question)
