"""The real vLLM: ready only when it answers, stopped without cutting answers off, also as the first process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.process import lifecycle, state
from serve.settings.config import ServerConfig
from tests.e2e.conftest import BOOT_SECONDS, Question, booted, free_port
from tests.e2e.test_serve import answers, gone, qvl, share_right
from tests.support.namespace import ALONE, may_unshare
from toolkit.errors import ServerError
from toolkit.paths import demo_checkpoint

pytestmark = pytest.mark.e2e


def overflowing(out: Path) -> Path:
    """The embedded model with one MLP whose inner activations leave float16's range, and whose outputs stay the same.

    up_proj is scaled by a power of two and down_proj by its inverse, which is exact in bfloat16.
    """
    shutil.copytree(demo_checkpoint(), out)
    tensors = load_file(out / "model.safetensors")
    for name, factor in (("up_proj", 2.0**14), ("down_proj", 2.0**-14)):
        key = f"model.layers.1.mlp.{name}.weight"
        tensors[key] = (tensors[key].to(torch.bfloat16) * factor).contiguous()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_overflow_stops_the_boot_and_names_what_helps(tmp_path: Path, questions: list[Question]) -> None:
    model = overflowing(tmp_path / "model")
    port = free_port()
    with pytest.raises(ServerError, match="--dtype bfloat16"):
        lifecycle.start(str(model), ServerConfig(port=port, timeout=BOOT_SECONDS))
    assert state.load(port) is None
    with booted(model, ServerConfig(port=port, timeout=BOOT_SECONDS, dtype="bfloat16")) as server:
        given = answers(server, questions)
    assert share_right(questions, given) >= 0.75


class LongAnswer:
    """A streamed answer of many tokens, read in a thread."""

    def __init__(self, url: str, tokens: int = 300, key: str | None = None) -> None:
        self.finish: str | None = None
        self.begun = threading.Event()
        self._body = {"model": "demo", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        self._url = url
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self.begun.wait(60)

    def _read(self) -> None:
        body: dict[str, Any] = {**self._body, "messages": [{"role": "user", "content": "Count."}]}
        with httpx.stream(
            "POST",
            f"{self._url}/v1/chat/completions",
            json=body,
            headers=self._headers,
            timeout=150,
            trust_env=False,
        ) as answer:
            for line in answer.iter_lines():
                if found := re.search(r'"finish_reason":"(\w+)"', line):
                    self.finish = found[1]
                if '"content":"' in line:
                    self.begun.set()

    def join(self) -> str | None:
        self._thread.join()
        return self.finish


def test_a_detached_server_drains(cache: Path) -> None:
    port = free_port()
    started = qvl("serve", "demo", "--detach", "--port", str(port), "--log-format", "json", "--drain", "2m")
    assert started.returncode == 0 and started.stdout.startswith(f"ready: demo at http://127.0.0.1:{port}/v1"), started
    known = state.load(port)
    assert known is not None and known.supervised
    url = known.url
    try:
        ready = httpx.get(f"{url}/ready", trust_env=False)
        assert ready.json() == {"ready": True, "state": "ready", "failures": 0}
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        assert "qvl_ready 1.0" in metrics and "qvl_restarts 0.0" in metrics
        members = state.group_members(known)
        kept_alive = httpx.Client(base_url=url, trust_env=False)
        kept_alive.get("/v1/models").raise_for_status()
        long = LongAnswer(url)
        stopping = subprocess.Popen([sys.executable, "-m", "toolkit.cli", "stop", "--port", str(port)])
        deadline = time.monotonic() + 20
        while kept_alive.get("/ready").json()["state"] != "draining":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        body = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        refused = kept_alive.post("/v1/chat/completions", json=body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) > 0 and refused.headers["connection"] == "close"
        assert long.join() == "length"
        assert stopping.wait(timeout=150) == 0
        assert gone(members, within=0.5) and not known.supervised and state.load(port) is None
    finally:
        qvl("stop", "--port", str(port), "--now")
    entries = [json.loads(line) for line in Path(known.log).read_text().splitlines() if line.startswith("{")]
    requests = [entry for entry in entries if entry["logger"] == "qvl.requests"]
    assert [(entry["route"], entry["status"], entry["refused"]) for entry in requests[-2:]] in (
        [("/v1/chat/completions", 503, "draining"), ("/v1/chat/completions", 200, None)],
        [("/v1/chat/completions", 200, None), ("/v1/chat/completions", 503, "draining")],
    )
    assert {"vllm", "uvicorn", "qvl"} <= {entry["logger"].partition(".")[0] for entry in entries}
    assert "Count." not in Path(known.log).read_text()  # no prompt in the log


@pytest.mark.release  # with a server that plays vLLM: tests/integration/serve/process/test_container.py
def test_as_the_first_process_of_a_container(tmp_path: Path) -> None:
    """In a process namespace `qvl serve` has the number 1: SIGTERM drains, no process is left and it exits with 0."""
    port = free_port()
    command = [sys.executable, "-m", "toolkit.cli", "serve", "demo", "--port", str(port), "--drain", "2m"]
    if alone := may_unshare():
        command = [*ALONE, *command]
    environment = {**os.environ, "QVL_CACHE": str(tmp_path)}
    with (tmp_path / "output").open("w") as output:
        outer = subprocess.Popen(
            [*command, "--api-key", "secret-0123456789"], stdout=output, stderr=output, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + BOOT_SECONDS
        while "ready: demo at" not in (printed := (tmp_path / "output").read_text()):
            # it knows; what happens before: tests/integration/serve/process/test_lifecycle.py
            assert outer.poll() is None and time.monotonic() < deadline, printed
            time.sleep(0.2)
        first = psutil.Process(outer.pid).children()[0] if alone else psutil.Process(outer.pid)
        everybody = first.children(recursive=True)
        assert len(everybody) >= 2 and not any("secret" in " ".join(each.cmdline()) for each in everybody)
        # The key is wanted, and opens.
        assert qvl("ask", "--url", url, "Why?").returncode == 2
        assert qvl("ask", "--url", url, "Why?", QVL_API_KEY="secret-0123456789").returncode == 0
        # An answer is under way when the signal comes, and is finished.
        long = LongAnswer(url, key="secret-0123456789")
        first.send_signal(signal.SIGTERM)
        assert long.join() == "length"
        assert outer.wait(timeout=150) == 0, (tmp_path / "output").read_text()
        assert gone(everybody, within=1)
    finally:
        outer.kill()
        outer.wait()
    lines = (tmp_path / "output").read_text().splitlines()
    assert lines[-1].endswith("stopped")
    assert [json.loads(line)["logger"] for line in lines if line.startswith('{"time"')], "JSON where no terminal is"
    assert not (tmp_path / "servers" / f"{port}.json").exists()  # nothing is written down of it any more


def test_a_public_address_takes_a_key() -> None:
    refused = qvl("serve", "demo", "--host", "0.0.0.0", "--port", str(free_port()))
    assert refused.returncode == 2 and "--api-key-file" in refused.stderr and "--insecure" in refused.stderr
