"""The real vLLM on two CPU processes, which split every layer or run a copy each, answers as one process does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from serve.process.lifecycle import Server, start
from serve.settings.config import ServerConfig
from serve.settings.parallel import Parallel
from tests.e2e.conftest import BOOT_SECONDS, Question, Served, booted, chat, free_port, top_logprobs
from tests.support import rounded
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ServerError
from toolkit.formats.convert import convert

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("served")]


@contextmanager
def spread(model: Path | str, parallel: Parallel) -> Iterator[Server]:
    options = ServerConfig(
        port=free_port(), timeout=BOOT_SECONDS, parallel=parallel, max_model_len=1024, max_num_seqs=4
    )
    with booted(model, options) as server:
        yield server


def workers(server: Server) -> int:
    """Processes that hold a model: those that have torch's library mapped and are vLLM's workers by name."""
    names = [" ".join(child.cmdline()) + child.name() for child in psutil.Process(server.pid).children(recursive=True)]
    return sum("VLLM::Worker" in name for name in names)


def test_a_padded_model_split_in_two_answers_like_the_whole(
    served: Served, questions: list[Question], tmp_path: Path
) -> None:
    narrow = rounded.narrowed(tmp_path / "narrow", 384)  # three groups of 128: two GPUs can't share them
    with pytest.raises(ServerError, match=r"384 inputs don't divide by 128 x 2.*--pad-tp 2` makes 2 work"):
        start(str(narrow), ServerConfig(port=free_port(), parallel=Parallel(tp=2)))
    padded = convert(narrow, tmp_path / "padded", pad_tp=2)
    assert Checkpoint.open(padded).text_config["intermediate_size"] == 512
    sample = questions[::4]
    whole = served(narrow)
    expected = [top_logprobs(whole, question) for question in sample]
    texts = [chat(whole, question)["message"]["content"] for question in sample]
    with spread(padded, Parallel(tp=2)) as server:
        assert workers(server) == 2
        for question, before in zip(sample, expected, strict=True):
            after = top_logprobs(server, question)
            for token, value in before.items():
                if value > -5 and token in after:  # float16, and sums in another order
                    assert after[token] == pytest.approx(value, abs=5e-2), (question, token)
            best = max(before, key=lambda token: before[token])
            assert best in after
            clear = sorted(before.values())[-1] - sorted(before.values())[-2] > 0.1
            if clear:
                assert max(after, key=lambda token: after[token]) == best
        same = sum(chat(server, q)["message"]["content"] == text for q, text in zip(sample, texts, strict=True))
    assert same >= len(sample) - 1


@pytest.mark.release
def test_two_copies_answer_like_one(served: Served, questions: list[Question]) -> None:
    sample = questions[::2]
    expected = [chat(served("demo"), question)["message"]["content"] for question in sample]
    with spread("demo", Parallel(dp=2)) as server, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda question: chat(server, question)["message"]["content"], sample))
    assert found == expected
