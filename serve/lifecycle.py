"""Start vLLM, wait until it really answers, look at it, drain and stop it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import httpx
import psutil

from serve import memory, state
from serve.backend import require_vllm
from serve.gemm import servable
from serve.log import Phases, decisive_lines, explain
from serve.media import sample_picture
from serve.options import ServeOptions
from serve.server import DIE_WITH
from toolkit.checkpoint import Checkpoint, resolve
from toolkit.errors import ServerError
from toolkit.paths import cache_dir

__all__ = ["Server", "Status", "start", "status", "statuses", "stop"]

#: Called while a server boots with the phase it has reached and the seconds since the start.
OnPhase = Callable[[str, float], None]
#: Seconds beyond the drain until a server that was asked to stop is killed.
_STOP_MARGIN = 15.0
_POLL = 0.2


@dataclass
class Server:
    """A running server that has answered an image question. As a context manager it stops at the end."""

    #: Where clients find it, such as "http://127.0.0.1:8000"; its API is under /v1.
    url: str
    port: int
    pid: int
    log: Path
    model_name: str
    #: The directory that was asked for.
    checkpoint: Path
    #: Seconds from start to ready.
    boot_seconds: float
    api_key: str | None = field(default=None, repr=False)
    _state: state.ServerState = field(repr=False, kw_only=True)
    _process: subprocess.Popen[bytes] = field(repr=False, kw_only=True)

    def stop(self, drain: bool = True) -> None:
        """Stop it and wait until no process of it is left; requests under way may finish first. Idempotent."""
        _end(self._state, drain)
        self._process.wait()

    def running(self) -> bool:
        """Whether its process still runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Wait until the server ends by itself and return its exit status."""
        return self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(drain=kind is None)


@dataclass(frozen=True)
class Status:
    """What is known about one server."""

    port: int
    #: "booting": not ready yet; "ready"; "silent": it runs but /health does not answer; "dead": its process is gone.
    state: Literal["booting", "ready", "silent", "dead"]
    url: str
    model_name: str
    checkpoint: str
    backend: str
    pid: int
    #: Seconds since its start; None when dead.
    uptime: float | None
    #: Bytes of host memory of all its processes, shared pages counted once; None when dead.
    memory: int | None
    log: str
    #: For a dead server, why, from its log.
    reason: str | None = None


def start(model: str, options: ServeOptions, *, on_phase: OnPhase | None = None, attached: bool = False) -> Server:
    """Start vLLM and return when it is ready: /health, /v1/models, and one image question answered.

    The server is a process group of its own and outlives this process, unless `attached`.

    Args:
        model: a directory, a hub name or "demo". A GEMV checkpoint is repacked first, see `serve.gemm`.
        options: see `ServeOptions`.
        on_phase: called several times a second while booting.
        attached: end the server when this process ends, however it ends.

    Raises CheckpointError for a model that can't be used, ResourceError for too little memory, ServerError for a port
    that is taken and for a vLLM that dies or does not answer in time. No process is left behind then.
    """
    require_vllm("gpu" if options.on_gpu else "cpu")
    _refuse_taken_port(options)
    directory = resolve(model)
    checkpoint = Checkpoint.open(directory)
    name = options.name_for(directory)
    options.arguments(checkpoint, name)  # a setting that does not suit the model is refused before anything is repacked
    memory.check(checkpoint, options)
    served = servable(checkpoint)
    began = time.monotonic()
    with state.locked("start", "servers"):
        _refuse_taken_port(options)
        log = _new_log(options.port)
        process = _spawn(options.arguments(served, name), options, log, attached)
        running = state.ServerState(
            port=options.port,
            pid=process.pid,
            created=psutil.Process(process.pid).create_time(),
            url=options.url,
            model_name=name,
            checkpoint=str(directory.resolve()),
            served=str(served.path.resolve()),
            backend=str(options.backend),
            log=str(log),
            shutdown_timeout=options.shutdown_timeout,
        )
        state.save(running)
    try:
        _wait_until_ready(process, running, options, began, on_phase)
    except BaseException:
        _end(running, drain=False)
        process.wait()
        raise
    running = replace(running, ready=True)
    state.save(running)
    return Server(
        url=options.url,
        port=options.port,
        pid=process.pid,
        log=log,
        model_name=name,
        checkpoint=directory,
        boot_seconds=time.monotonic() - began,
        api_key=options.api_key,
        _state=running,
        _process=process,
    )


def status(port: int) -> Status:
    """Return what is known about the server on this port. Raises ServerError when qvl started none there."""
    return _status(_known(port))


def statuses() -> list[Status]:
    """Return what is known about all servers that were started and not stopped, by port."""
    return [_status(known) for known in state.load_all()]


def stop(port: int, drain: bool = True) -> Status:
    """Stop the server on this port; requests under way may finish first.

    Returns what was known about it before. Raises ServerError when qvl started none there, or it will not end.
    """
    known = _known(port)
    before = _status(known)
    _end(known, drain)
    return before


def _known(port: int) -> state.ServerState:
    known = state.load(port)
    if known is None:
        others = ", ".join(str(other.port) for other in state.load_all())
        raise ServerError(
            f"qvl has no server on port {port}. " + (f"It has some on: {others}." if others else "It has none at all.")
        )
    return known


def _refuse_taken_port(options: ServeOptions) -> None:
    known = state.load(options.port)
    if known is not None and known.alive:
        raise ServerError(
            f"port {options.port} is taken by qvl's server of {known.model_name} (pid {known.pid}). "
            f"Stop it with `qvl stop --port {options.port}`, or give another --port."
        )
    if known is not None:
        state.end_group(known, grace=0)  # what a server that died may have left
        state.remove(known)
    holder = state.port_holder(options.host, options.port)
    if holder is not None:
        raise ServerError(f"port {options.port} is taken by {holder}. Stop that, or give another --port.")


def _new_log(port: int) -> Path:
    """Return the path of a new, empty log file; the one before is kept as PORT.log.1."""
    log = cache_dir("servers", f"{port}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.1"))
    log.touch(mode=0o600)
    return log


def _spawn(arguments: list[str], options: ServeOptions, log: Path, attached: bool) -> subprocess.Popen[bytes]:
    environment = options.environment(os.environ)
    if attached:
        environment[DIE_WITH] = str(os.getpid())
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "serve.server", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _end(known: state.ServerState, drain: bool) -> None:
    # One that boots has no request under way, and would not heed being asked.
    state.end_group(known, grace=known.shutdown_timeout + _STOP_MARGIN if drain and known.ready else 0)
    state.remove(known)


def _wait_until_ready(
    process: subprocess.Popen[bytes],
    running: state.ServerState,
    options: ServeOptions,
    began: float,
    on_phase: OnPhase | None,
) -> None:
    phases = Phases(Path(running.log))
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    with httpx.Client(base_url=running.url, headers=headers, timeout=10, trust_env=False) as client:
        for _ in _until(began + options.timeout):
            phase = phases.update()
            if on_phase is not None:
                on_phase(phase, time.monotonic() - began)
            if process.poll() is not None:
                raise explain(Path(running.log), process.returncode, phase)
            if _healthy(client):
                break
        else:
            raise ServerError(
                f"vLLM was not ready after {options.timeout:g} s: it was still {phases.current}. "
                f"Give a longer --timeout, or read {running.log}"
            )
        remaining = max(30.0, began + options.timeout - time.monotonic())
        try:
            _ask_test_question(client, running.model_name, remaining)
        except httpx.HTTPError as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise explain(
                    Path(running.log), process.wait(timeout=5), "answering its first image question"
                ) from error
            raise ServerError(
                f"vLLM started but its first image question got no answer ({type(error).__name__}). See {running.log}"
            ) from error


def _until(deadline: float) -> Iterator[None]:
    while time.monotonic() < deadline:
        yield
        time.sleep(_POLL)


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _ask_test_question(client: httpx.Client, name: str, timeout: float) -> None:
    """Ask the model's list and one question about a picture.

    Raises ServerError unless both are answered as they should be.
    """
    listed = client.get("/v1/models")
    names = [model["id"] for model in listed.json()["data"]] if listed.is_success else []
    if name not in names:
        raise ServerError(f"vLLM serves {names or listed.text!r} where {name!r} was asked for.")
    content = [
        {"type": "image_url", "image_url": {"url": sample_picture()}},
        {"type": "text", "text": "What colour is the circle?"},
    ]
    question = {"role": "user", "content": content}
    body = {"model": name, "messages": [question], "max_tokens": 8, "temperature": 0}
    answered = client.post("/v1/chat/completions", json=body, timeout=timeout)
    if not answered.is_success:
        raise ServerError(
            f"vLLM refused its first image question ({answered.status_code}): {answered.text[:400]}\n"
            "Its tokenizer, processor or chat template may be missing: check the directory with `qvl inspect`."
        )
    answer = answered.json()["choices"][0]["message"]["content"] or ""
    if len(answer) > 3 and not answer.strip("!"):
        raise ServerError(
            f"the model answers {answer!r}: its activations overflow float16. Serve it with --dtype bfloat16."
        )


def _status(known: state.ServerState) -> Status:
    alive = known.alive
    kind: Literal["booting", "ready", "silent", "dead"]
    reason = None
    if not alive:
        kind = "dead"
        with contextlib.suppress(OSError):
            reason = "; ".join(decisive_lines(Path(known.log).read_text(errors="replace"), limit=2))
    elif not known.ready:
        kind = "booting"
    else:
        with httpx.Client(base_url=known.url, timeout=5, trust_env=False) as client:
            kind = "ready" if _healthy(client) else "silent"
    return Status(
        port=known.port,
        state=kind,
        url=known.url,
        model_name=known.model_name,
        checkpoint=known.checkpoint,
        backend=known.backend,
        pid=known.pid,
        uptime=time.time() - known.created if alive else None,
        memory=_memory(known) if alive else None,
        log=known.log,
        reason=reason,
    )


def _memory(known: state.ServerState) -> int:
    """Return the bytes of all of a server's processes, each shared page split among its users (PSS)."""
    total = 0
    for process in state.group_members(known):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total
