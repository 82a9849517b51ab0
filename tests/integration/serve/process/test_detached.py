"""A supervisor in a process of its own: what it is asked, and how it tells of what fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serve.process.detached import Asked, detach
from serve.process.supervisor import Policy
from serve.settings.config import ServerConfig
from serve.settings.engine import EngineSettings
from serve.settings.limits import Limits
from serve.settings.lora import Lora
from serve.settings.parallel import Parallel
from serve.settings.tls import Tls
from toolkit.errors import ServerError

#: Every kind of setting that is more than a number.
FULL = ServerConfig(
    backend="gpu",
    host="0.0.0.0",
    api_key="hunter2",
    guard=Limits(max_images=3, image_hosts=("a.example",), rate_per_minute=1.5),
    play=True,
    play_beside="http://127.0.0.1:1",
    loras=(Lora("charts", Path("/adapters/charts"), 16),),
    parallel=Parallel(tp=2),
    tls=Tls(ssl_certfile="/c.pem", ssl_keyfile="/k.pem"),
    settings=EngineSettings(cudagraph_sizes=(1, 2), mm_cache_gb=0),
    profile="latency",
    drain="2m",
    compile=False,
    extra=("--swap-space", "0"),
)


@pytest.mark.parametrize("config", [ServerConfig(backend="cpu"), FULL])
def test_what_is_asked_passes_through_json(config: ServerConfig) -> None:
    asked = Asked("demo", config, Policy(restarts=3, wait=0.5))
    assert Asked.loads(asked.dumps()) == asked
    json.loads(asked.dumps())


def test_keys_pass_through_the_pipe_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, Any]] = []
    real, said = subprocess.Popen, tmp_path / "said"

    def started(command: list[str], env: dict[str, str], **kinds: Any) -> Any:
        seen.append((command, env))
        echo = "import sys; print(sys.stdin.read(), file=open(sys.argv[1], 'w'))"
        return real([sys.executable, "-c", echo, str(said)], env=env, **kinds)

    monkeypatch.setattr("serve.process.detached.subprocess.Popen", started)
    with pytest.raises(ServerError, match="ended before the server was ready"):
        detach("demo", FULL, Policy())
    assert "hunter2" not in repr(seen) and "hunter2" in said.read_text()


def test_a_detached_boot_that_fails_tells_why(tmp_path: Path) -> None:
    environment = {**os.environ, "QVL_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "toolkit.cli", "serve", "demo", "--detach", "--max-model-len", "100000"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2 and "has 4096 positions" in done.stderr and "Traceback" not in done.stderr
