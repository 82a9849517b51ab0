"""`qvl serve` as the first process of a container. What it starts plays vLLM; the real one: tests/e2e/test_ready.py."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.support.namespace import ALONE, may_unshare

#: `qvl` whose vLLM says at once that it is ready, and has a child, as an engine is. On SIGTERM it tells in a file who
#: has the number 1, and ends; its child does not.
_PLAYED = """
import http.server, json, os, pathlib, signal, subprocess, sys
from serve.process import launch
from toolkit.cli import main

def spawn(arguments, environment, log, attached):
    with log.open("ab") as stream:
        command = [sys.executable, __file__, "server", arguments[arguments.index("--port") + 1]]
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"ready": True, "state": "ready"}).encode())

def end(number, frame):
    pathlib.Path(__file__).with_name("ended").write_text(str(os.getppid()))
    os._exit(0)

if sys.argv[1] == "server":
    engine = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", engine])
    signal.signal(signal.SIGTERM, end)
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
else:
    launch.spawn = spawn
    main()
"""


def test_it_ends_what_it_started_and_then_itself(tmp_path: Path) -> None:
    """SIGTERM is passed on as what asks vLLM to drain; no process is left; the exit status is 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program, said = tmp_path / "played.py", tmp_path / "said"
    program.write_text(_PLAYED)
    command = [sys.executable, str(program), "serve", "demo", "--port", str(port), "--api-key", "secret-0123456789"]
    if alone := may_unshare():
        command = [*ALONE, *command]
    environment = {**os.environ, "QVL_CACHE": str(tmp_path / "cache")}
    with said.open("w") as output:
        outer = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        deadline = time.monotonic() + 120
        while "ready: demo at" not in (printed := said.read_text()):
            assert outer.poll() is None and time.monotonic() < deadline, printed
            time.sleep(0.05)
        first = psutil.Process(outer.pid).children()[0] if alone else psutil.Process(outer.pid)
        everybody = first.children(recursive=True)
        assert len(everybody) >= 2 and not any("secret" in " ".join(each.cmdline()) for each in everybody)
        first.send_signal(signal.SIGTERM)
        assert outer.wait(timeout=120) == 0, said.read_text()
        assert psutil.wait_procs(everybody, timeout=10)[1] == []
    finally:
        outer.kill()
        outer.wait()
    assert (tmp_path / "ended").read_text() == ("1" if alone else str(first.pid))
    lines = said.read_text().splitlines()
    assert lines[-1].endswith("stopped")
    assert not (tmp_path / "cache" / "servers" / f"{port}.json").exists()  # nothing is written down of it any more
