from __future__ import annotations

import asyncio

import httpx
import pytest

from bench.endpoint import discover, normalise_url, public_url
from tests.bench.fake_server import Behaviour, serving
from toolkit.errors import BenchError, ServerError


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://host/models/a/v1", "https://host/models/a"),
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
    with serving(Behaviour(api_key="k")) as server, pytest.raises(ServerError, match="--api-key"):
        asyncio.run(discover(server.url, "wrong"))


def test_nobody_there_is_said() -> None:
    with serving() as server:
        url = server.url
    with pytest.raises(ServerError, match=r"no server answers at .*qvl serve"):
        asyncio.run(discover(url))


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
