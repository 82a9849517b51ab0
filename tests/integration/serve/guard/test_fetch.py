"""Images by URL: what is fetched, and above all what is not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from bench.chaos.hostile import chat_body, data_url, good_image
from serve.guard.fetch import Fetcher, is_public
from serve.http.errors import Refusal
from tests.support.guard_app import Client

PUBLIC = "93.184.215.14"
IMAGE = good_image()


def found(content: bytes = IMAGE, status: int = 200) -> httpx.Response:
    async def pieces() -> Any:
        yield content

    return httpx.Response(status, content=pieces())


def fetcher(
    handler: Callable[[httpx.Request], httpx.Response] | None = None,
    names: dict[str, list[str]] | None = None,
    hosts: tuple[str, ...] = ("images.example", "other.example", "here.example:8080"),
    **settings: Any,
) -> Fetcher:
    known = {"images.example": [PUBLIC], "other.example": ["2606:4700::1111"], "here.example": [PUBLIC]}

    async def resolve(host: str, port: int) -> list[str]:
        found = (known | (names or {})).get(host)
        if found is None:
            raise OSError("no such name")
        return found

    def image(request: httpx.Request) -> httpx.Response:
        return found()

    options = {"max_bytes": 10_000, "seconds": 2.0} | settings
    return Fetcher(hosts, resolve=resolve, transport=httpx.MockTransport(handler or image), **options)


def refused(fetch: Fetcher, url: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        asyncio.run(fetch.fetch(url))
    assert caught.value.reason in ("image_url", "image_bytes")
    return caught.value


def test_the_connection_goes_to_the_address_that_was_checked() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return found()

    assert asyncio.run(fetcher(handler).fetch("https://images.example/a.png?b=1#c")) == IMAGE
    assert str(seen[0].url) == f"https://{PUBLIC}/a.png?b=1"
    assert seen[0].headers["host"] == "images.example"
    assert seen[0].extensions["sni_hostname"] == "images.example"
    assert "authorization" not in seen[0].headers and "cookie" not in seen[0].headers
    asyncio.run(fetcher(handler).fetch("http://OTHER.example./x"))
    assert seen[1].url.host == "2606:4700::1111"
    asyncio.run(fetcher(handler).fetch("http://here.example:8080/x"))
    assert (seen[2].url.port, seen[2].headers["host"]) == (8080, "here.example:8080")


@pytest.mark.parametrize(
    "url",
    [
        "https://unknown.example/a.png",
        "https://images.example:8080/a.png",
        "https://here.example/a.png",
        "https://images.example.evil.example/",
        "https://evil.example/images.example",
        "https://images.example@evil.example/",
        "https://user:password@images.example/",
        "https://evil.example\\@images.example/",
        "https://images.example%00.evil.example/",
        "https://images.example%2eevil.example/",
        "ftp://images.example/a.png",
        "file://images.example/etc/passwd",
        "gopher://images.example/",
        "https:///a.png",
        "https://",
        "http://[::1",
        "http://images.example:99999/",
        f"http://{PUBLIC}/a.png",
    ],
)
def test_what_the_list_does_not_name_is_not_asked(url: str) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise AssertionError(f"asked {request.url}")

    refused(fetcher(handler), url)


def test_without_a_list_nothing_is_fetched() -> None:
    assert "data URL" in refused(fetcher(hosts=()), "https://images.example/").message


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1",
        "255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::7f00:1", "64:ff9b::7f00:1",
        "64:ff9b:1::1", "2002:7f00:1::", "2001::1", "2001:db8::1", "fc00::1", "fd00:ec2::254", "fe80::1",
        "fe80::1%eth0", "fec0::1", "ff02::1", "ff0e::1", "100::1", "localhost", "", "8.8.8.8.8",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)

    def handler(request: httpx.Request) -> httpx.Response:
        raise AssertionError(f"asked {request.url}")

    message = refused(fetcher(handler, {"images.example": [address]}), "https://images.example/").message
    assert message == refused(fetcher(handler, {"images.example": []}), "https://images.example/").message
    # One public address among others does not help.
    refused(fetcher(handler, {"images.example": [PUBLIC, address]}), "https://images.example/")


@pytest.mark.parametrize("address", ["8.8.8.8", PUBLIC, "1.1.1.1", "2606:4700::1111", "2a00:1450:4001::1"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


def test_the_real_resolver_finds_loopback() -> None:
    fetch = Fetcher(("localhost",), 1000, 2.0)
    assert refused(fetch, "http://localhost/").message == "An image's URL can't be fetched."


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1/", "http://localhost/", "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd",
        "https://unknown.example/", "//evil.example/", "http://inside.example/", "https://images.example:22/",
    ],
)  # fmt: skip
def test_redirects_are_checked_like_the_first(target: str) -> None:
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(302, headers={"location": target})

    hosts = ("images.example", "inside.example")
    refused(fetcher(handler, {"inside.example": ["10.0.0.1"]}, hosts=hosts), "https://images.example/")
    assert len(asked) == 1


def test_redirects_within_the_list_are_followed_but_not_for_ever() -> None:
    asked: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers["host"] + request.url.path)
        if request.url.path == "/end":
            return found()
        return httpx.Response(307, headers={"location": "/end" if "other" in asked[-1] else "//other.example/next"})

    assert asyncio.run(fetcher(handler).fetch("https://images.example/")) == IMAGE
    assert asked == ["images.example/", "other.example/next", "other.example/end"]
    again = fetcher(lambda request: httpx.Response(302, headers={"location": "/again"}))
    assert "too often" in refused(again, "https://images.example/").message


def test_a_name_that_changes_its_address_gains_nothing() -> None:
    answers = iter([[PUBLIC], ["127.0.0.1"]])
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        return next(answers)

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(302, headers={"location": "/again"})

    fetch = Fetcher(("images.example",), 1000, 2.0, resolve=resolve, transport=httpx.MockTransport(handler))
    refused(fetch, "https://images.example/")
    assert asked == [PUBLIC]


def test_size_and_time_are_bounded() -> None:
    read = 0

    async def endless() -> Any:
        nonlocal read
        while True:
            read += 1000
            yield b"x" * 1000

    huge = fetcher(lambda request: httpx.Response(200, content=endless()))
    assert refused(huge, "https://images.example/").reason == "image_bytes"
    assert read <= 12_000

    async def slow() -> Any:
        yield b"x"
        await asyncio.sleep(30)

    stuck = fetcher(lambda request: httpx.Response(200, content=slow()), seconds=0.1)
    refused(stuck, "https://images.example/")


@pytest.mark.parametrize("status", [204, 401, 404, 500])
def test_only_success_is_taken(status: int) -> None:
    fetch = fetcher(lambda request: found(b"internal words", status))
    assert "internal" not in refused(fetch, "https://images.example/").message


def test_a_fetched_image_reaches_the_engine_as_a_data_url() -> None:
    client = Client(fetcher=fetcher())
    url = "https://images.example/a.png"
    assert asyncio.run(client.ask(body=chat_body("m", url, url, max_tokens=3))).status == 200
    inner = json.loads(client.app.requests[0][1])
    parts = inner["messages"][0]["content"]
    assert [part["image_url"]["url"] for part in parts[:2]] == [data_url(IMAGE)] * 2
    assert inner["max_tokens"] == 3
    assert asyncio.run(client.ask(body=chat_body("m", url))).status == 200
    assert json.loads(client.app.requests[1][1])["max_tokens"] == 4096


def test_what_is_fetched_is_checked_like_any_image() -> None:
    client = Client(fetcher=fetcher(lambda request: found(b"<svg/>")))
    answer = asyncio.run(client.ask(body=chat_body("m", "https://images.example/a.png")))
    assert answer.error["code"] == "image_format"
