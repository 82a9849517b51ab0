"""Start vLLM, wait until it really answers, drain and stop it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from serve.guard.keys import read_keys
from serve.process import launch, memory, state
from serve.process.bootlog import Phases, explain
from serve.process.launch import server_environment
from serve.process.repack import servable
from serve.process.status import Status, describe, readiness
from serve.process.trust import quick_client
from serve.settings.arguments import vllm_arguments
from serve.settings.backend import require_vllm
from serve.settings.config import ServerConfig
from serve.settings.lora import check_lora
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.problems import refuse_broken
from toolkit.errors import ResourceError, ServerError
from toolkit.paths import cache_dir
from toolkit.sources.directory import resolve

__all__ = ["Drained", "OnPhase", "Server", "start", "stop"]

#: Called while a server boots with the phase it has reached and the seconds since the start.
OnPhase = Callable[[str, float], None]
#: Seconds beyond the drain until a server that was asked to stop is killed.
_STOP_MARGIN = 15.0
_POLL = 0.2


class Drained(KeyboardInterrupt):
    """An interrupt that came when the server had just become ready: it was drained and is gone."""


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
    #: Bytes at the log's beginning that tell of earlier starts.
    log_start: int = 0
    _state: state.ServerState = field(repr=False, kw_only=True)
    _process: subprocess.Popen[bytes] = field(repr=False, kw_only=True)

    def stop(self, drain: bool = True) -> None:
        """Stop it and wait until no process of it is left; requests under way may finish first. Idempotent."""
        _end(self._state, drain)
        self._process.wait()

    def clear(self) -> None:
        """After its death, end what its processes have left; it stays written down, so that it can be found."""
        state.end_group(self._state, grace=0)
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


def start(
    model: str,
    config: ServerConfig,
    *,
    on_phase: OnPhase | None = None,
    attached: bool = False,
    supervised: bool = False,
    restarts: int = 0,
) -> Server:
    """Start vLLM and return when it is ready: when it has answered a question about an image.

    The server is a process group of its own and outlives this process, unless `attached`.

    Args:
        model: a directory, a hub name or "demo". A GEMV checkpoint is repacked first, see `serve.process.repack`.
        config: see `ServerConfig`.
        on_phase: called several times a second while booting.
        attached: end the server when this process ends, however it ends.
        supervised: this process will start it again when it dies; see `serve.process.supervisor`.
        restarts: how often that has happened; the log is then continued.

    Raises CheckpointError for a model that can't be used, ResourceError for too little memory or disk, ServerError for
    a port that is taken, a file of keys that can't be read, and a vLLM that dies or does not answer in time, and
    Drained instead of KeyboardInterrupt when clients could have had requests under way. No process is left behind then.
    """
    began = time.monotonic()
    prepared = _prepare(model, config)
    config = config.fitted(prepared.served)
    try:
        with state.locked("start", "servers"):
            _refuse_taken_port(config)
            log = _new_log(config.port, keep=restarts > 0)
            log_start = log.stat().st_size
            served = prepared.served
            token_pixels = served.family.token_pixels(served.vision)
            environment = server_environment(
                config, os.environ, prepared.name, token_pixels=token_pixels, began=began, restarts=restarts
            )
            arguments = vllm_arguments(config, prepared.served, prepared.name)
            process = launch.spawn(arguments, environment, log, attached)
            running = _written_down(config, prepared, process.pid, log, supervised, restarts)
            with _ended_on_error(running, process):
                _save(running)
    except OSError as error:
        raise ResourceError(
            f"{cache_dir('servers')} can't be written ({error.strerror or error}). Free some space, or set QVL_CACHE."
        ) from error
    with _ended_on_error(running, process):
        _wait_until_ready(process, running, config, began, on_phase, log_start)
        running = replace(running, ready=True)
        with contextlib.suppress(OSError):
            state.save(running)
    return Server(
        url=config.url,
        port=config.port,
        pid=process.pid,
        log=log,
        model_name=prepared.name,
        checkpoint=prepared.directory,
        boot_seconds=time.monotonic() - began,
        api_key=config.api_key,
        log_start=log_start,
        _state=running,
        _process=process,
    )


@dataclass(frozen=True)
class _Prepared:
    """A model that can be served."""

    #: The one that was asked for.
    directory: Path
    #: Its name on the server.
    name: str
    #: What vLLM reads: the same, or its repacked twin.
    served: Checkpoint


def _prepare(model: str, config: ServerConfig) -> _Prepared:
    """Refuse what would fail after minutes of booting, as early as possible; raises what `start` does."""
    require_vllm(config.device)
    _refuse_taken_port(config)
    directory = resolve(model)
    checkpoint = Checkpoint.open(directory)
    refuse_broken(checkpoint)
    name = config.name_for(directory)
    vllm_arguments(config, checkpoint, name)  # one that does not suit the model is refused before anything is repacked
    if config.guard is not None and config.guard.api_key_file is not None:
        read_keys(Path(config.guard.api_key_file))
    config.tls.check()
    config.recording.check()
    for lora in config.loras:
        check_lora(lora, checkpoint)
    memory.check(checkpoint, config)
    return _Prepared(directory, name, servable(checkpoint))


def _written_down(
    config: ServerConfig, prepared: _Prepared, pid: int, log: Path, supervised: bool, restarts: int
) -> state.ServerState:
    """Return what others are to know of a server that was started."""
    return state.ServerState(
        port=config.port,
        pid=pid,
        created=state.process_start(pid),
        url=config.url,
        model_name=prepared.name,
        checkpoint=str(prepared.directory.resolve()),
        served=str(prepared.served.path.resolve()),
        backend=config.device,
        log=str(log),
        drain=config.drain,
        supervisor=os.getpid() if supervised else None,
        supervisor_created=state.process_start(os.getpid()) if supervised else 0.0,
        restarts=restarts,
        certificate=None if config.tls.files is None else config.tls.files[0],
        host=state.hostname(),
        numbering=state.numbering(),
    )


def stop(port: int, drain: bool = True) -> Status:
    """Stop the server on this port; requests under way may finish first.

    Returns what was known about it before. Raises ServerError when qvl started none there, on this machine, or it will
    not end.
    """
    known = state.require(port)
    if known.elsewhere:
        raise ServerError(
            f"the server on port {port} was started on {known.host or 'another machine'}, where this one can't end it: "
            f"run `qvl stop --port {port}` there (in a container, inside it). If it is gone, remove "
            f"{state.state_file(port)}."
        )
    before = describe(known)
    state.end_supervisor(known, _grace(known) if drain else 0)
    _end(state.load(port) or known, drain)  # the supervisor may have started another one meanwhile, or forgotten it
    return before


def _refuse_taken_port(config: ServerConfig) -> None:
    known = state.load(config.port)
    if known is not None and not known.ours and (known.alive or known.supervised):
        raise ServerError(
            f"port {config.port} is taken by qvl's server of {known.model_name} (pid {known.pid}). "
            f"Stop it with `qvl stop --port {config.port}`, or give another --port."
        )
    if known is not None:
        state.end_group(known, grace=0)  # what a server that died may have left
        if not known.ours:
            state.remove(known)
    holder = state.port_holder(config.host, config.port)
    if holder is not None:
        raise ServerError(f"port {config.port} is taken by {holder}. Stop that, or give another --port.")


def _new_log(port: int, keep: bool = False) -> Path:
    """Return the path of a new, empty log file; the one before is kept as PORT.log.1. Or `keep` and continue it."""
    log = cache_dir("servers", f"{port}.log")
    if keep and log.exists():
        return log
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_suffix(".log.1"))
    log.touch(mode=0o600)
    return log


def _save(running: state.ServerState) -> None:
    """Write down a server. A restart goes on without: its supervisor is written down, and a full disk is no reason."""
    try:
        state.save(running)
    except OSError:
        if running.restarts == 0:
            raise


@contextlib.contextmanager
def _ended_on_error(running: state.ServerState, process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no process behind when the block fails or is interrupted.

    A server that has said to the world that it is ready may have requests under way, though nobody here has heard it
    say so: an interrupt drains it. Raises Drained then, and what was raised otherwise.
    """
    try:
        yield
    except BaseException as error:
        drained = isinstance(error, KeyboardInterrupt) and _has_been_ready(running)
        try:
            state.end_group(running, grace=_grace(running) if drained else 0)
        finally:
            state.end_group(running, grace=0)  # also when a second interrupt ends the wait
            process.wait()
            if running.restarts == 0:
                state.remove(running)  # otherwise its supervisor goes on, and must be found
        if drained:
            raise Drained from None
        raise


def _grace(known: state.ServerState) -> float:
    return known.drain + _STOP_MARGIN


def _has_been_ready(known: state.ServerState) -> bool:
    """Ask the server itself, which knows it before whoever waits for it does."""
    with quick_client(known.url, 1) as client:
        said = readiness(client)
    return said is not None and said["state"] not in ("starting", "failed")


def _end(known: state.ServerState, drain: bool) -> None:
    # One that boots has no request under way, and would not heed being asked.
    drain = drain and (known.ready or _has_been_ready(known))
    state.end_group(known, grace=_grace(known) if drain else 0)
    state.remove(known)


def _wait_until_ready(
    process: subprocess.Popen[bytes],
    running: state.ServerState,
    config: ServerConfig,
    began: float,
    on_phase: OnPhase | None,
    log_start: int,
) -> None:
    phases = Phases(Path(running.log), start=log_start)
    said: dict[str, Any] | None = None
    with quick_client(running.url, 10) as client:
        for _ in _until(began + config.timeout):
            phase = phases.update()
            if on_phase is not None:
                on_phase(phase, time.monotonic() - began)
            if process.poll() is not None:
                raise explain(Path(running.log), process.returncode, phase, log_start)
            said = readiness(client)
            if said is not None and said["ready"]:
                return
            if said is not None and said["state"] == "failed":
                raise ServerError(f"{running.checkpoint} can't be served like this: {said['reason']}")
    what = f"{phases.current}: {said['reason']}" if said is not None else phases.current
    raise ServerError(
        f"vLLM was not ready after {config.timeout:g} s: it was still {what}. "
        f"Give a longer --timeout, or read {running.log}"
    )


def _until(deadline: float) -> Iterator[None]:
    while time.monotonic() < deadline:
        yield
        time.sleep(_POLL)
