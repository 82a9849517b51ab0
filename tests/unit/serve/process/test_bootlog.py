"""The logs in logs/ are vLLM 0.32's own, of the embedded model started wrongly; paths shortened, routes left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.process.bootlog import Phases, cap, decisive_lines, explain, follow
from toolkit.errors import QvlError, ResourceError, ServerError

LOGS = Path(__file__).parent / "logs"


@pytest.mark.parametrize(
    ("log", "kind", "line", "advice"),
    [
        ("flag", ServerError, "unrecognized arguments: --nonsense 3", "vllm serve --help=all"),
        ("kv", ResourceError, "requested memory for kv (838.19 GiB)", "smaller --max-model-len"),
        ("shape", ServerError, "start (0) + length (768) exceeds dimension size (512)", "qvl inspect"),
    ],
)
def test_real_deaths(log: str, kind: type[QvlError], line: str, advice: str) -> None:
    error = explain(LOGS / f"{log}.log", 1, "loading weights")
    assert type(error) is kind
    message = str(error)
    assert line in message
    assert advice in message
    assert message.startswith("vLLM died while loading weights (exit status 1)")
    assert str(LOGS / f"{log}.log") in message
    assert len(message.splitlines()) <= 5
    assert "Traceback" not in message and "pid=" not in message


def test_killed_by_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("INFO: loading\n")
    error = explain(tmp_path / "x.log", -9, "loading weights")
    assert isinstance(error, ResourceError)
    assert "killed by the system" in str(error) and "INFO: loading" in str(error)


def test_other_signals(tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("")
    assert "AVX-512" in str(explain(tmp_path / "x.log", -4, "warming up"))
    assert "signal 11" in str(explain(tmp_path / "x.log", -11, "warming up"))


def test_cause_before_consequence() -> None:
    text = (
        "(EngineCore pid=7) ERROR 11-23 04:45:07 [core.py:1] torch.OutOfMemoryError: CUDA out of memory.\n"
        "(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory.\n"
        "(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert decisive_lines(text) == ["torch.OutOfMemoryError: CUDA out of memory."]


def test_consequence_where_there_is_nothing_else() -> None:
    text = "(APIServer pid=5) RuntimeError: Engine core initialization failed. See root cause above.\n"
    assert decisive_lines(text) == ["RuntimeError: Engine core initialization failed. See root cause above."]


def test_message_of_several_lines() -> None:
    text = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, User-specified max_model_len (9) is greater. [type=value_error, input_value=1]\n"
        "    For further information visit https://errors.pydantic.dev\n"
    )
    (line,) = decisive_lines(text)
    assert line.endswith("1 validation error for ModelConfig Value error, User-specified max_model_len (9) is greater.")


def test_no_traceback_at_all() -> None:
    assert decisive_lines("a\n\nb\nc\nd\ne\n", limit=2) == ["d", "e"]
    assert decisive_lines("") == []


def test_long_lines_are_cut() -> None:
    (line,) = decisive_lines("ValueError: " + "x" * 5000)
    assert len(line) < 450


def test_phases_follow_the_growing_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("")
    phases = Phases(log)
    assert phases.update() == "importing vLLM"
    seen = []
    with log.open("a") as stream:
        for line in (LOGS / "kv.log").read_text().splitlines(keepends=True):
            stream.write(line[: len(line) // 2])  # lines may be seen half-written
            stream.flush()
            phases.update()
            stream.write(line[len(line) // 2 :])
            stream.flush()
            seen.append(phases.update())
    assert list(dict.fromkeys(seen)) == [
        "importing vLLM",
        "reading the model",
        "starting the engine",
        "loading weights",
        "preparing the KV cache",
    ]


def test_follow_until_the_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_text("before\n")
    rounds = iter([True, True, False])

    def running() -> bool:
        with log.open("a") as stream:
            stream.write("half ")
        return next(rounds)

    lines = []
    for line in follow(log, running):
        lines.append(line)
    assert lines == []
    with log.open("a") as stream:
        stream.write("line\n")

    def ended() -> bool:
        with log.open("a") as stream:
            stream.write("last\n")
        return False

    assert list(follow(log, ended)) == ["last"]


def test_a_log_is_cut_when_it_has_grown(tmp_path: Path) -> None:
    log = tmp_path / "8000.log"
    with log.open("ab", buffering=0) as writer:  # as a server holds it
        writer.write(b"a" * 90 + b"\n")
        cap(log, 100)
        assert log.stat().st_size == 91
        writer.write(b"b" * 20 + b"\n")
        cap(log, 100)
        assert log.read_bytes() == b""
        assert (tmp_path / "8000.log.1").stat().st_size == 112
        writer.write(b"c\n")
        assert log.read_bytes() == b"c\n"
    cap(tmp_path / "none.log", 1)


def test_following_goes_on_after_the_cut(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("old\n" * 50)

    def write(text: str) -> None:
        with log.open("a") as stream:
            stream.write(text)

    steps = iter([lambda: write("new\n"), lambda: cap(log, 10), lambda: write("after\n")])

    def more() -> bool:
        step = next(steps, None)
        if step is not None:
            step()
        return step is not None

    lines = list(follow(log, while_true=more))
    assert lines[0] == "new" and lines[-1] == "after"


def test_phases_of_a_second_boot_in_the_same_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Application startup complete\n")
    phases = Phases(log, start=log.stat().st_size)
    assert phases.update() == "importing vLLM"
    with log.open("a") as stream:
        stream.write("Starting to load model\n")
    assert phases.update() == "loading weights"
