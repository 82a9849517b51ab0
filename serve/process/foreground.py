"""`qvl serve` as a user sees it: the phases of the boot, where the server is, its log until Ctrl-C."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from serve.guard.keyfile import concerns, key_of, read_keys
from serve.http.logs import line, write
from serve.process.bootlog import follow
from serve.process.detached import Booted, detach
from serve.process.lifecycle import Drained, OnPhase, Server
from serve.process.supervisor import Policy, Supervised, Supervisor, stopped_by_signals, supervisor
from serve.settings.config import ServerConfig
from toolkit.console import err, note, out, warn

__all__ = ["serve", "voice", "warn_of"]


def serve(model: str, config: ServerConfig) -> None:
    """Start a server and show it until it ends; or only until it is ready, where it is to be left running.

    Raises what `serve.process.lifecycle.start` raises, and GaveUp for a server that keeps dying.
    """
    what = f"{model} on port {config.port}"
    policy = Policy(restarts=config.restarts)
    with stopped_by_signals():
        if config.detach:
            with _progress(what) as on_phase:
                booted = detach(model, config, policy, on_phase)
            _announce(booted, f"qvl stop --port {config.port}")
            return
        with contextlib.ExitStack() as boot:
            on_phase = boot.enter_context(_progress(what))
            _stay(supervisor(model, config, policy, voice(config), on_phase), boot)


def warn_of(config: ServerConfig) -> None:
    """Say what an operator should know of keys and certificate; raises ServerError for files that are of no use."""
    guard = config.guard
    keys = [key_of(guard.api_key)] if guard is not None and guard.api_key is not None else []
    if guard is not None and guard.api_key_file is not None:
        keys += read_keys(Path(guard.api_key_file))
    say = warn if config.log_format == "text" else _say_json
    recorded = config.recording.check()
    for text in [*concerns(keys, time.time()), *config.tls.check(), *([recorded] if recorded else [])]:
        say(text)


def voice(config: ServerConfig) -> Callable[[str], None]:
    """Return how to say something beside the server's log: as a line of JSON where that is JSON."""
    return note if config.log_format == "text" else _say_json


def _say_json(text: str) -> None:
    write(line("warning", "qvl.supervisor", text))


@contextlib.contextmanager
def _progress(what: str) -> Iterator[OnPhase]:
    """Show the phase of a boot and the seconds since its start: one live line,
    or a line a phase where there is no terminal.
    """
    if err.is_terminal:
        with err.status(f"starting {what}") as live:
            yield lambda phase, seconds: live.update(f"starting {what}: {phase} ({seconds:.0f} s)")
        return
    seen: list[str] = []

    def report(phase: str, seconds: float) -> None:
        if seen[-1:] != [phase]:
            seen.append(phase)
            note(f"starting {what}: {phase} ({seconds:.0f} s)")

    yield report


def _announce(server: Booted | Server, how_to_stop: str) -> None:
    out.print(f"ready: {server.model_name} at {server.url}/v1 after {server.boot_seconds:.0f} s", highlight=False)
    note(f"log: {server.log}\nask:  qvl ask --url {server.url} --image IMAGE QUESTION\nstop: {how_to_stop}")


class _Printer:
    """Shows a log as it grows, from a thread of its own."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, log: Path) -> None:
        self._thread = threading.Thread(target=self._show, args=(log,), daemon=True)
        self._thread.start()

    def _show(self, log: Path) -> None:
        for text in follow(log, while_true=lambda: not self._stopped.is_set()):
            sys.stderr.write(f"{text}\n")
            sys.stderr.flush()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=2)


def _stay(own: Supervisor, boot: contextlib.ExitStack) -> None:
    """Run the server and show its log until Ctrl-C; a second Ctrl-C does not wait for requests under way.

    `boot` is closed when the server is ready for the first time.
    """
    printer = _Printer()

    def up(server: Supervised) -> None:
        boot.close()
        assert isinstance(server, Server)
        _announce(server, "Ctrl-C")
        printer.start(server.log)

    own.up = up
    try:
        own.run()
    except Drained:
        note("stopped")
    except KeyboardInterrupt:
        if own.server is None:
            raise
        note("stopping: requests under way may finish, Ctrl-C again cuts them off")
        try:
            own.server.stop()
        except KeyboardInterrupt:
            own.server.stop(drain=False)
        note("stopped")
    finally:
        printer.stop()
