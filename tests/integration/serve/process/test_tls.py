"""A server that speaks TLS is started, asked, seen and stopped as any other; vLLM is played."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from bench.load.endpoint import discover
from serve.ask import ask
from serve.process import launch, lifecycle, state
from serve.process.status import known_server
from serve.process.trust import context_for
from serve.settings.config import ServerConfig
from serve.settings.tls import Tls
from tests.integration.serve.process.test_lifecycle import free
from tests.support.certificates import NAME, certificate
from tests.unit.serve.test_cli import app
from toolkit.errors import ServerError

__all__ = ["free"]

#: Is what the arguments of `vllm serve` make of it, as far as this is about.
_SERVER = """
import http.server, json, ssl, sys
option = lambda name: sys.argv[sys.argv.index(name) + 1]
answer = {"choices": [{"index": 0, "delta": {"content": "seven"}, "finish_reason": "stop"}]}
class Handler(http.server.BaseHTTPRequestHandler):
    def say(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        models = {"data": [{"id": "m"}]}
        self.say(json.dumps(models if "models" in self.path else {"ready": True, "state": "ready"}).encode())
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.say(b"data: " + json.dumps(answer).encode() + b"\\n\\ndata: [DONE]\\n\\n")
class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client):
        pass  # a client that refuses the certificate
server = Server(("127.0.0.1", int(option("--port"))), Handler)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(option("--ssl-certfile"), option("--ssl-keyfile"))
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    def spawn(arguments: list[str], environment: dict[str, str], log: Path, attached: bool) -> Any:
        command = [sys.executable, "-c", _SERVER, *arguments]
        with log.open("ab") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)

    monkeypatch.setattr(launch, "spawn", spawn)


def config(port: int, files: tuple[str, str]) -> ServerConfig:
    return ServerConfig(port=port, timeout=120, drain=1, tls=Tls(ssl_certfile=files[0], ssl_keyfile=files[1]))


def test_the_life_of_a_server_with_a_certificate(free: int, tmp_path: Path) -> None:
    """Its name is not the address that this machine asks at, and nobody has signed it."""
    files = certificate(tmp_path)
    with lifecycle.start("demo", config(free, files)) as server:
        assert server.url == f"https://127.0.0.1:{free}"
        known = state.require(free)
        assert (known.url, known.certificate, known.ready) == (server.url, files[0], True)
        assert known_server(free).state == "ready"
        told = CliRunner().invoke(app, ["ask", "How many?"])  # finds the only server, and trusts it
        assert told.exit_code == 0 and told.stdout == "seven\n", told.output
        for url in (server.url, f"https://localhost:{free}"):
            assert asyncio.run(discover(url)).model == "m"
        with pytest.raises(ServerError, match=r"not trusted .*SSL_CERT_FILE"):
            ask(server.url, "Why?", [])  # as somebody who does not know it
    assert state.load(free) is None


def test_a_certificate_that_has_expired_is_no_reason_to_restart(free: int, tmp_path: Path) -> None:
    with lifecycle.start("demo", config(free, certificate(tmp_path, ends=timedelta(hours=-1)))) as server:
        assert known_server(free).state == "ready"
        with pytest.raises(ServerError, match=r"not valid now .*expired"):
            asyncio.run(discover(server.url))


def test_only_the_servers_own_certificate_is_trusted(free: int, tmp_path: Path) -> None:
    """Another program has the port meanwhile, with a certificate of its own: it must not be told the key."""
    with lifecycle.start("demo", config(free, certificate(tmp_path / "a"))) as server:
        state.save(replace(state.require(free), certificate=certificate(tmp_path / "b")[0]))
        with pytest.raises(ServerError, match="not trusted"):
            list(ask(server.url, "Why?", [], model="m", verify=context_for(server.url)))
        with pytest.raises(ServerError, match="not trusted"):
            asyncio.run(discover(server.url))


def test_others_are_checked_as_usual(free: int, tmp_path: Path) -> None:
    with lifecycle.start("demo", config(free, certificate(tmp_path))) as server:
        for url in (f"https://{NAME}:{free}", f"http://127.0.0.1:{free}", "https://127.0.0.1:1", "https://127.0.0.1"):
            assert context_for(url) is None
        assert context_for(server.url) is not None


def test_files_are_looked_at_before_anything_starts(free: int, tmp_path: Path, cache: Path) -> None:
    one, other = certificate(tmp_path / "a"), certificate(tmp_path / "b")
    with pytest.raises(ServerError, match="is not the key of"):
        lifecycle.start("demo", config(free, (one[0], other[1])))
    assert not (cache / "servers").exists()


def test_plain_http_is_no_server_that_is_ready(free: int, tmp_path: Path) -> None:
    with lifecycle.start("demo", config(free, certificate(tmp_path))) as server, pytest.raises(httpx.HTTPError):
        httpx.get(server.url.replace("https", "http"), trust_env=False)
