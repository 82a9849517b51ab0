from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from bench.load.endpoint import discover, http_client, normalise_url, public_url
from bench.load.wire import Wire
from tests.support.fake_server import Behaviour, serving
from toolkit.errors import BenchError, ServerError


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://host/models/a/v1", "https://host/models/a"),
        ("http://127.0.0.1:8000/v1/chat/completions", "http://127.0.0.1:8000"),
        ("HTTP://127.0.0.1:8000/v1/chat/completions/", "http://127.0.0.1:8000"),
        ("HTTPS://host/v1/models", "https://host"),
    ],
)
def test_urls_lead_to_the_root(given: str, root: str) -> None:
    assert normalise_url(given) == root


@pytest.mark.parametrize("given", ["", "localhost:8000", "ftp://host", "http://", "http://host:port"])
def test_what_is_no_url_is_refused(given: str) -> None:
    with pytest.raises(BenchError, match="http"):
        normalise_url(given)


def test_passwords_are_not_printed() -> None:
    assert public_url("https://user:secret@host:1/x") == "https://host:1/x"


def test_a_server_tells_its_model_and_version() -> None:
    with serving(Behaviour(api_key="k")) as server:
        endpoint = asyncio.run(discover(server.url + "/v1", "k"))
    assert (endpoint.url, endpoint.model, endpoint.version) == (server.url, "fake", "9.9.9")
    assert "k'" not in repr(endpoint)


def test_a_refused_key_is_said() -> None:
    with serving(Behaviour(api_key="k")) as server, pytest.raises(ServerError, match="QVL_API_KEY"):
        asyncio.run(discover(server.url, "wrong"))


def failed(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}] failed")
    error.reason = reason
    return error


def certified(said: str) -> ssl.SSLError:
    error = ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")
    error.verify_message = said
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (certified("self-signed certificate"), "is not trusted here (self-signed certificate)"),
        (certified("unable to get local issuer certificate"), "SSL_CERT_FILE"),
        (certified("certificate has expired"), "not valid now"),
        (certified("Hostname mismatch, certificate is not valid for 'a'."), "another host's (Hostname mismatch"),
        (certified("IP address mismatch, certificate is not valid for '1.2.3.4'."), "use the name it is made out to"),
        (failed("WRONG_VERSION_NUMBER"), "does not speak TLS there; write http://"),
        (failed("TLSV1_ALERT_PROTOCOL_VERSION"), "TLS failed (tlsv1 alert protocol version)"),
        (ssl.SSLError(1, "broken"), "TLS failed"),
    ],
)
def test_what_is_wrong_with_tls_is_said_in_words(error: ssl.SSLError, words: str) -> None:
    class Broken(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError(str(error)) from error

    with pytest.raises(ServerError) as caught:
        asyncio.run(discover("https://host", transport=Broken()))
    assert words in str(caught.value) and str(caught.value).startswith("https://host: ")


def test_nobody_there_is_said() -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(ServerError, match=r"no server answers at .*qvl serve"):
        asyncio.run(discover(url))


class Proxy(BaseHTTPRequestHandler):
    """Answers for every host, as a proxy does: a request to one has the whole URL in its first line."""

    def do_GET(self) -> None:
        body = json.dumps({"data": [{"id": self.path}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


def test_a_proxy_is_used_for_a_server_elsewhere(proxy: None) -> None:
    endpoint = asyncio.run(discover("http://far.example:8000"))
    assert endpoint.model == "http://far.example:8000/v1/models"


def test_a_proxy_is_not_used_for_a_server_on_this_machine(proxy: None) -> None:
    with serving() as server:
        assert asyncio.run(discover(server.url)).model == "fake"


@pytest.mark.parametrize(
    ("url", "environment", "wired"),
    [
        ("http://127.0.0.1:1", {"http_proxy": "http://p:1"}, True),
        ("http://[::1]:1", {"all_proxy": "http://p:1"}, True),
        ("http://far.example", {}, True),
        ("http://far.example", {"http_proxy": "http://p:1"}, False),
        ("http://far.example", {"all_proxy": "http://p:1"}, False),
        ("http://far.example", {"https_proxy": "http://p:1"}, True),
        ("http://gpu.far.example", {"http_proxy": "http://p:1", "no_proxy": "far.example"}, True),
    ],
)
def test_nothing_but_a_proxy_keeps_the_fast_transport_away(
    proxy: None, monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], wired: bool
) -> None:
    monkeypatch.delenv("http_proxy")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert isinstance(http_client(url)._transport, Wire) is wired


def test_a_model_that_is_not_served_is_refused() -> None:
    with serving() as server, pytest.raises(ServerError, match="it serves fake"):
        asyncio.run(discover(server.url, model="other"))


@pytest.mark.parametrize(
    "answer", [httpx.Response(200, text="<html>"), httpx.Response(404), httpx.Response(200, json={})]
)
def test_another_kind_of_server_is_said(answer: httpx.Response) -> None:
    transport = httpx.MockTransport(lambda request: answer)
    with pytest.raises(ServerError, match="OpenAI-compatible"):
        asyncio.run(discover("http://127.0.0.1:1", transport=transport))
