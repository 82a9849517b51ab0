"""The real vLLM serves a checkpoint whose decoder linears are partly in 16 bits, and answers as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serve.process import state
from tests.e2e.conftest import Question, Served, top_logprobs
from tests.e2e.test_serve import answers, share_right
from tests.support import rounded
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.inspection import inspect_checkpoint
from toolkit.models.qwen2_vl import QWEN2_VL

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("served")]

#: A whole layer, and each unit of a layer alone; every unit is packed in some other layer.
LEFT = frozenset(
    {(1, name) for name in QWEN2_VL.linears}
    | {(0, name) for name in QWEN2_VL.fused["self_attn.qkv_proj"]}
    | {(2, name) for name in QWEN2_VL.fused["mlp.gate_up_proj"]}
    | {(3, "self_attn.o_proj"), (4, "mlp.down_proj")}
)


def first_tokens(
    checkpoint: Path, questions: list[Question], change: Callable[[Any], None] = lambda model: None
) -> list[dict[str, float]]:
    """The log-probability of every first token by transformers in float32 on the dequantized weights, by its text."""
    from toolkit.demo.fidelity import load

    model: Any = load(checkpoint)
    change(model)
    import torch
    from PIL import Image
    from transformers import Qwen2VLProcessor

    processor = Qwen2VLProcessor.from_pretrained(checkpoint)
    found = []
    for question in questions:
        content = [{"type": "image"}, {"type": "text", "text": question.question}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        with Image.open(question.image) as image, torch.no_grad():
            logits = model(**processor(images=[image.convert("RGB")], text=[text], return_tensors="pt")).logits
        found.append({processor.decode([i]): float(v) for i, v in enumerate(logits[0, -1].log_softmax(-1))})
    return found


def test_vllm_runs_what_is_left_in_16_bits(
    served: Served, questions: list[Question], tmp_path: Path, cache: Path
) -> None:
    # GEMV, so that the repacking of `qvl serve` is on the way.
    mixed = rounded.write(tmp_path / "mixed", LEFT, version="gemv")
    assert inspect_checkpoint(mixed).problems == []
    packed = rounded.write(tmp_path / "packed", frozenset(), version="gemv")
    server = served(mixed)
    # It was repacked into the cache, under its own name (as the same numbers: tests/unit/serve/process/test_repack.py).
    assert server.model_name == "mixed" and server.checkpoint == mixed
    known = state.load(server.port)
    assert known is not None and Path(known.served).parent == cache / "gemm"
    assert Checkpoint.open(known.served).quantization != Checkpoint.open(mixed).quantization
    assert share_right(questions, answers(server, questions)) >= 0.75
    sample = questions[::4]
    apart = []
    for question, expected, other in zip(
        sample, first_tokens(mixed, sample), first_tokens(packed, sample), strict=True
    ):
        seen = top_logprobs(server, question)
        likeliest = max(seen, key=lambda token: seen[token])
        assert seen[likeliest] == pytest.approx(expected[likeliest], abs=5e-3), question
        for token, value in seen.items():
            if value > -8:  # float16 keeps three digits
                assert value == pytest.approx(expected[token], abs=5e-2), (question, token)
                apart.append(abs(value - other[token]))
    assert max(apart) > 0.1  # the 16-bit weights are what makes the difference
