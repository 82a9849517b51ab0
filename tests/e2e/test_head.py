"""The real vLLM serves a checkpoint whose output head is in 4 bits, and answers as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Question, Served
from tests.e2e.test_mixed import first_tokens
from tests.e2e.test_serve import answers, share_right, top_logprobs
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.inspection import inspect_checkpoint
from toolkit.formats.reference import load_reference
from toolkit.paths import demo_checkpoint
from toolkit.quantize import quantize

pytestmark = pytest.mark.e2e


def test_vllm_runs_a_head_in_4_bits(served: Served, questions: list[Question], tmp_path: Path) -> None:
    """A tied head before; fails where a vLLM no longer gives `ParallelLMHead` a 4-bit kernel, or pads it."""
    made = quantize("demo", tmp_path / "head", samples=16, lm_head=True, verdict=False)
    assert inspect_checkpoint(made).problems == []
    assert "lm_head.qweight" in Checkpoint.open(made).tensors
    server = served(made)
    assert share_right(questions, answers(server, questions)) >= 0.75
    sample = questions[::4]
    near, far = [], []
    ours, others = first_tokens(made, sample), first_tokens(made, sample, with_the_sources_head)
    for question, expected, other in zip(sample, ours, others, strict=True):
        seen = top_logprobs(server, question)
        for token, value in seen.items():
            if value > -8:  # float16 keeps three digits
                assert value == pytest.approx(expected[token], abs=5e-2), (question, token)
                near.append(abs(value - expected[token]))
                far.append(abs(value - other[token]))
    assert sum(near) < 0.5 * sum(far)  # it is the packed head that is served


def with_the_sources_head(model: Any) -> None:
    """Put the source's output head in the place of a model's."""
    model.lm_head.load_state_dict(load_reference(Checkpoint.open(demo_checkpoint())).lm_head.state_dict())
