"""A server under a supervisor in a process of its own: `qvl serve --detach`.

`python -m serve.process.detached` reads one JSON object from its standard input, what to start and how, and writes to
its standard output, one JSON object a line, how the first boot goes. API keys pass through that pipe, for the command
line and the environment would show them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.http.logs import line
from serve.process.lifecycle import Drained, OnPhase, Server
from serve.process.supervisor import GaveUp, Policy, Supervised, Supervisor, stopped_by_signals, supervisor
from serve.settings.config import ServerConfig
from toolkit import errors
from toolkit.errors import QvlError, ServerError
from toolkit.paths import source_root

__all__ = ["Asked", "Booted", "detach", "main"]


@dataclass(frozen=True)
class Asked:
    """What the process is to do."""

    model: str
    config: ServerConfig
    policy: Policy

    def dumps(self) -> str:
        """Return it as JSON, API keys and all."""
        config = self.config.model_dump(mode="json")
        return json.dumps({"model": self.model, "config": config, "policy": asdict(self.policy)})

    @classmethod
    def loads(cls, text: str | bytes) -> Asked:
        """Read what `dumps` wrote."""
        found = json.loads(text)
        return cls(found["model"], ServerConfig(**found["config"]), Policy(**found["policy"]))


@dataclass(frozen=True)
class Booted:
    """What is known of a detached server once it is ready."""

    url: str
    model_name: str
    log: Path
    boot_seconds: float


def detach(model: str, config: ServerConfig, policy: Policy, on_phase: OnPhase | None = None) -> Booted:
    """Start a server under a supervisor of its own and return when it is ready; both outlive this process.

    Raises what `serve.process.lifecycle.start` raises. No process is left behind then, nor when this one is
    interrupted.
    """
    root = str(source_root())
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.process.detached"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process.stdin, process.stdout:
        try:
            process.stdin.write(Asked(model, config, policy).dumps().encode())
            process.stdin.close()
            for text in process.stdout:
                said: dict[str, Any] = json.loads(text)
                if "phase" in said and on_phase is not None:
                    on_phase(said["phase"], said["seconds"])
                elif "error" in said:
                    raise getattr(errors, said["kind"], ServerError)(said["error"])
                elif "url" in said:
                    return Booted(said["url"], said["model_name"], Path(said["log"]), said["boot_seconds"])
            raise ServerError(f"the supervisor ended before the server was ready (exit status {process.wait()}).")
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            process.wait()
            raise


def _tell(said: dict[str, Any]) -> None:
    """Write a line to whoever waits for the first boot; nobody may wait any more."""
    with contextlib.suppress(OSError):
        os.write(1, f"{json.dumps(said)}\n".encode())


class _Voice:
    """Tells whoever waits of the first boot; after it, the server's log of what happens."""

    log: Path | None = None

    def on_phase(self, phase: str, seconds: float) -> None:
        _tell({"phase": phase, "seconds": seconds})

    def say(self, text: str) -> None:
        if self.log is not None:
            with contextlib.suppress(OSError), self.log.open("a") as stream:
                stream.write(line("warning", "qvl.supervisor", text, pid=os.getpid()) + "\n")

    def up(self, server: Supervised) -> None:
        assert isinstance(server, Server)
        self.log = server.log
        _tell(
            {
                "url": server.url,
                "model_name": server.model_name,
                "log": str(server.log),
                "boot_seconds": server.boot_seconds,
            }
        )
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # the reader has gone its way


def main() -> int:
    """Run as a process of its own; returns its exit status."""
    asked = Asked.loads(sys.stdin.buffer.read())
    voice = _Voice()
    own = supervisor(asked.model, asked.config, asked.policy, voice.say, voice.on_phase)
    own.up = voice.up
    with stopped_by_signals():
        return _run(own, voice)


def _run(own: Supervisor, voice: _Voice) -> int:
    try:
        own.run()
    except Drained:
        return 0
    except KeyboardInterrupt:
        if own.server is None:
            return 130
        with contextlib.suppress(KeyboardInterrupt):
            own.server.stop()
            return 0
        own.server.stop(drain=False)
        return 0
    except GaveUp as error:
        voice.say(str(error))
        return 1
    except QvlError as error:
        _tell({"error": str(error), "kind": type(error).__name__})
        return 2
    except Exception:  # nobody reads this process's stderr; its end takes the server with it
        text = f"the supervisor itself failed:\n{traceback.format_exc()}"
        voice.say(text)
        _tell({"error": text, "kind": "ServerError"})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
