"""What of the life of a server can be seen without vLLM; tests/e2e boots it."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.process import launch, lifecycle, memory, state
from serve.process.status import known_server, known_servers, readiness
from serve.process.supervisor import Policy, Supervised, supervisor
from serve.settings.config import ServerConfig
from serve.settings.limits import Limits
from tests.support.serve import Start
from tests.unit.serve.process.test_memory import sparse
from toolkit.errors import CheckpointError, ResourceError, ServerError


@pytest.fixture
def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def test_port_taken_by_another_program(taken: int) -> None:
    with pytest.raises(ServerError, match=rf"port {taken} is taken by .*another --port"):
        lifecycle.start("demo", ServerConfig(port=taken))


def test_port_taken_by_a_server_of_ours(start: Start, free: int) -> None:
    state.save(start(free))
    with pytest.raises(ServerError, match=rf"qvl stop --port {free}"):
        lifecycle.start("demo", ServerConfig(port=free))


def test_not_a_checkpoint(tmp_path: Path, free: int, cache: Path) -> None:
    (tmp_path / "empty").mkdir()
    for model in ("no/such/directory", str(tmp_path / "empty")):
        with pytest.raises(CheckpointError):
            lifecycle.start(model, ServerConfig(port=free))
    assert state.load_all() == []


def test_not_enough_memory_is_seen_before_anything_starts(tmp_path: Path, free: int, cache: Path) -> None:
    huge = sparse(tmp_path / "huge", 900)
    with pytest.raises(ResourceError, match="GiB are available"):
        lifecycle.start(str(huge.path), ServerConfig(port=free))
    assert not (cache / "servers").exists()


def test_setting_that_does_not_suit_the_model(free: int) -> None:
    with pytest.raises(ServerError, match="has 4096 positions"):
        lifecycle.start("demo", ServerConfig(port=free, max_model_len=100_000))


def test_a_file_of_keys_is_read_before_the_boot(free: int, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    options = ServerConfig(port=free, guard=Limits(api_key_file=str(keys)))
    with pytest.raises(ServerError, match="can't be read"):
        lifecycle.start("demo", options)
    keys.write_text("# none yet\n")
    with pytest.raises(ServerError, match="holds no key"):
        lifecycle.start("demo", options)
    assert state.load_all() == []


def test_a_full_disk_ends_a_first_start_and_no_restart(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spawned: list[Any] = []
    spawn = subprocess.Popen

    def full(known: state.ServerState) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def sleeper(*arguments: Any, **options: Any) -> Any:
        spawned.append(spawn([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True))
        return spawned[-1]

    monkeypatch.setattr(state, "save", full)
    monkeypatch.setattr("serve.process.launch.subprocess.Popen", sleeper)
    with pytest.raises(ResourceError, match=r"No space left on device.*QVL_CACHE"):
        lifecycle.start("demo", ServerConfig(port=free))
    assert spawned[0].poll() is not None  # nothing is left behind
    with pytest.raises(ServerError, match="not ready after 1 s"):  # it got as far as waiting for the server
        lifecycle.start("demo", ServerConfig(port=free, timeout=1), supervised=True, restarts=1)
    assert spawned[1].poll() is not None


#: A server that says that it is in the state given, and says in a file that it was asked to end.
_SAYING = """
import http.server, json, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"ready": sys.argv[2] == "ready", "state": sys.argv[2]}).encode())
def end(number, frame):
    open(sys.argv[3], "w").close()
    os._exit(0)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
signal.signal(signal.SIGTERM, end)
server.serve_forever()
"""


def start_saying(port: int, said: str, ended: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _SAYING, str(port), said, str(ended)], start_new_session=True)


@pytest.mark.parametrize(("said", "expected"), [("ready", lifecycle.Drained), ("starting", KeyboardInterrupt)])
def test_an_interrupt_before_anybody_heard_that_it_is_ready(
    said: str, expected: type[BaseException], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients hear it from the server itself: requests may be under way while whoever started it does not know yet."""
    spawned: list[subprocess.Popen[bytes]] = []

    def spawn(*arguments: Any) -> subprocess.Popen[bytes]:  # not before: it would have the port that must be free
        spawned.append(start_saying(free, said, tmp_path / "ended"))
        return spawned[0]

    monkeypatch.setattr(launch, "spawn", spawn)

    def interrupt(phase: str, seconds: float) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{free}", trust_env=False) as client:
            while readiness(client) is None:  # not to return: what waits would hear of it before this does
                assert spawned[0].poll() is None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        lifecycle.start("demo", ServerConfig(port=free, timeout=120), on_phase=interrupt)
    assert raised.type is expected
    assert (tmp_path / "ended").exists() == (said == "ready")
    assert state.load_all() == [] and state.port_holder("127.0.0.1", free) is None


def test_a_restart_waits_for_memory_that_others_hold(
    free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others have all memory for a while, says the machine. With vLLM: tests/e2e/test_serve_faults.py."""
    spawned: list[subprocess.Popen[bytes]] = []

    def spawn(*arguments: Any) -> subprocess.Popen[bytes]:
        spawned.append(start_saying(free, "ready", tmp_path / "ended"))
        return spawned[-1]

    monkeypatch.setattr(launch, "spawn", spawn)
    held = itertools.count()
    available = memory.available_memory
    taken: list[bool] = []

    def what_is_left() -> int:
        if taken and next(held) < 10:
            return 0
        return available()

    monkeypatch.setattr(memory, "available_memory", what_is_left)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if "the server is back" in text:
            raise KeyboardInterrupt

    def up(server: Supervised) -> None:
        taken.append(True)
        os.kill(server.pid, signal.SIGKILL)

    policy = Policy(restarts=1, wait=0.01, wait_for_others=0.01, window=90)  # one death is all it may have
    own = supervisor("demo", ServerConfig(port=free, timeout=120), policy, say, None)
    own.up = up
    with pytest.raises(KeyboardInterrupt):
        own.run()
    assert own.restarts == 1 and next(held) >= 10
    known = state.require(free)
    assert known.supervised and known.restarts == 1 and known.alive
    state.end_group(known, grace=0)
    assert [process.wait() for process in spawned] == [-signal.SIGKILL] * 2
    down, waits, back = said
    assert "the server is down: vLLM was killed (SIGKILL)" in down and "is back" in back
    assert "Stop what" in waits and "looking again every 0.01 s for 90 s" in waits


def test_stop_drains_what_only_clients_know_to_be_ready(start: Start, free: int, tmp_path: Path) -> None:
    process = start_saying(free, "ready", tmp_path / "ended")
    known = replace(start(free), pid=process.pid, created=state.process_start(process.pid))
    state.save(known)
    with httpx.Client(base_url=known.url, trust_env=False) as client:
        while readiness(client) is None:
            assert process.poll() is None
    lifecycle.stop(free)
    assert (tmp_path / "ended").exists() and process.wait() == 0


def test_stop_and_status_of_what_is_not_there(start: Start) -> None:
    for function in (lifecycle.stop, known_server):
        with pytest.raises(ServerError, match=r"no server on port 18140\. It has none at all"):
            function(18140)
    state.save(start(18141))
    with pytest.raises(ServerError, match="It has some on: 18141"):
        lifecycle.stop(18140)
    assert lifecycle.stop(18141, drain=False).state == "booting"
    assert known_servers() == []


def test_states(start: Start, free: int, tmp_path: Path) -> None:
    known = start(free)
    state.save(known)
    seen = known_server(free)
    assert (seen.state, seen.model_name, seen.pid) == ("booting", "m", known.pid)
    assert seen.uptime is not None and 0 <= seen.uptime < 600
    assert seen.memory is not None and seen.memory > 1 << 20
    state.save(replace(known, ready=True))
    assert known_server(free).state == "silent"
    state.end_group(known, grace=0)
    (tmp_path / "log").write_text("(EngineCore pid=1) ValueError: it was this\n")
    seen = known_server(free)
    assert (seen.state, seen.reason, seen.memory) == ("dead", "ValueError: it was this", None)
    (only,) = known_servers()
    assert only == seen
    lifecycle.stop(free)
    assert known_servers() == []


def saying(**said: Any) -> httpx.Client:
    def handle(request: httpx.Request) -> httpx.Response:
        assert request.url.path == "/ready"
        return httpx.Response(200 if said.get("ready") else 503, json=said)

    return httpx.Client(transport=httpx.MockTransport(handle), base_url="http://test")


def test_readiness_is_what_the_server_says() -> None:
    with saying(ready=True, state="ready", failures=0) as client:
        assert readiness(client) == {"ready": True, "state": "ready", "failures": 0}
    with saying(ready=False, state="stalled", failures=2, reason="slow") as client:
        assert (readiness(client) or {})["reason"] == "slow"
    with saying(something="else") as client:
        assert readiness(client) is None
    with httpx.Client(base_url="http://127.0.0.1:9") as client:
        assert readiness(client) is None


def test_a_supervised_port_is_taken_even_while_its_server_is_down(start: Start, free: int) -> None:
    known = start(free)
    state.end_group(known, grace=0)
    keeper = start(18142)
    down = replace(known, supervisor=keeper.pid, supervisor_created=keeper.created, ready=True)
    state.save(down)
    assert known_server(free).state == "restarting"
    with pytest.raises(ServerError, match="is taken by qvl's server"):
        lifecycle.start("demo", ServerConfig(port=free))
    assert lifecycle.stop(free).state == "restarting"
    assert not keeper.alive
    assert known_servers() == []


def test_a_server_of_another_machine_is_told_of_and_left_alone(start: Start, free: int) -> None:
    """The cache directory may be shared: over NFS, or as a volume of several containers."""
    family = start(free)
    state.save(replace(family, numbering="another-boot pid:[1]", host="gpu-7"))
    seen = known_server(free)
    assert (seen.state, seen.uptime, seen.reason) == ("elsewhere", None, "started on gpu-7: ask there")
    with pytest.raises(ServerError, match=rf"was started on gpu-7.*qvl stop --port {free}.*{free}\.json"):
        lifecycle.stop(free)
    assert family.alive
    state.save(replace(family, numbering="another-boot pid:[1]"))  # this machine, before it was restarted
    assert known_server(free).state == "dead"
    assert lifecycle.stop(free).state == "dead"
    assert family.alive and known_servers() == []


def test_a_start_passes_over_what_a_reboot_has_left(start: Start, free: int) -> None:
    family = start(free)
    state.save(replace(family, numbering="another-boot pid:[1]"))
    with pytest.raises(CheckpointError):
        lifecycle.start("no/such/directory", ServerConfig(port=free))
    assert family.alive


def test_the_log_before_is_kept(cache: Path) -> None:
    log = lifecycle._new_log(18140)
    log.write_text("first")
    assert lifecycle._new_log(18140).read_text() == ""
    assert log.with_suffix(".log.1").read_text() == "first"
    log.write_text("second")
    assert lifecycle._new_log(18140, keep=True).read_text() == "second"
