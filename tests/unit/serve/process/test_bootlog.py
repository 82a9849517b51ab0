"""The logs in logs/ are vLLM 0.32's own, of the embedded model started wrongly; paths shortened, routes left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.http import logs
from serve.process.bootlog import Phases, cap, cause_of_death, decisive_lines, explain, follow
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


CLIENT = (
    "(APIServer pid=5) ERROR 11-23 04:45:07 [serving.py:1] Traceback (most recent call last):\nValueError: a client's\n"
)
FATAL = (
    "(EngineCore pid=7) ERROR 11-23 04:45:09 [core.py:1] EngineCore encountered a fatal error.\n"
    "(EngineCore pid=7) ERROR 11-23 04:45:09 [core.py:1] Traceback (most recent call last):\n"
    "(EngineCore pid=7) ERROR 11-23 04:45:09 [core.py:1] RuntimeError: CUDA error: an illegal memory access\n"
    "(APIServer pid=5) ERROR 11-23 04:45:09 [async_llm.py:1] AsyncLLM output_handler failed.\n"
    "(APIServer pid=5) vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
)


def request(status: int) -> str:
    return logs.line("info", "qvl.requests", "request", id="x", route="/v1/chat/completions", status=status) + "\n"


UP = logs.line("info", "qvl.ready", "ready.", pid=5) + "\n"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (CLIENT + FATAL, "RuntimeError: CUDA error: an illegal memory access"),
        (CLIENT + request(200), "its log says nothing of it"),
        (CLIENT + request(200) + "ValueError: the cause\n" + request(500), "ValueError: the cause"),
        # a stream that the death has cut is logged after it, with the status that it began with
        (CLIENT + request(500) + FATAL + request(200), "RuntimeError: CUDA error: an illegal memory access"),
        # one that was started again since, and has died of something else
        (FATAL + "INFO:     Application startup complete.\n" + UP + "KeyError: 'now'\n", "KeyError: 'now'"),
        (FATAL + UP + "the last line\n" + request(499), "the last line"),
        (
            CLIENT + "(EngineCore pid=7) ERROR 11-23 04:45:09 [m.py:1] Worker proc VllmWorker-1 died unexpectedly "
            "(exit code: -9), shutting down executor.\n"
            "(EngineCore pid=7) vllm.v1.engine.exceptions.EngineDeadError: x\n",
            "Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.",
        ),
    ],
)
def test_a_death_is_not_put_down_to_a_client(text: str, cause: str) -> None:
    assert cause_of_death(text, 1) == f"vLLM ended by itself (exit status 1): {cause}"


def test_who_is_killed_has_not_said_why() -> None:
    assert cause_of_death(CLIENT, -9) == "vLLM was killed (SIGKILL): the kernel does that when memory runs out (dmesg)"
    assert cause_of_death(CLIENT, -11) == "vLLM was killed (SIGSEGV)"
    text = CLIENT + "Fatal Python error: Segmentation fault\n\nCurrent thread\n"
    assert cause_of_death(text, -11).startswith("vLLM was killed (SIGSEGV): Fatal Python error: Segmentation fault")
    assert cause_of_death(CLIENT + FATAL, -6).endswith("(SIGABRT): RuntimeError: CUDA error: an illegal memory access")
    assert cause_of_death("", -64) == "vLLM was killed (SIGRTMAX)"


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
