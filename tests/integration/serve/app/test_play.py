"""The page's server side: files and their headers, and what reaches the second server."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.app.play import Beside, Play
from serve.guard.app import Guard
from serve.http.sse import EventDecoder
from serve.settings.limits import Limits
from serve.settings.play import PlayOptions
from tests.support.play_app import FakeVllm, lifespan, serving
from toolkit.errors import ServerError

QUESTION: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "say one two three"}],
    "max_tokens": 8,
    "stream": True,
}
#: Starts the page before an app, beside a second server, and gives its URL.
Start = Callable[..., str]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def run(inner: ASGIApp, beside: ASGIApp | str | None = None, limits: Limits | None = None) -> str:
            url = beside if beside is None or isinstance(beside, str) else stack.enter_context(serving(beside))
            monkeypatch.setenv("QVL_PLAY", PlayOptions(beside=url).dumps())
            monkeypatch.setenv("QVL_GUARD", (limits or Limits()).dumps())
            app = Play(Guard(Beside(inner) if url else inner))
            return stack.enter_context(serving(app))

        yield run


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=20) as opened:
        yield opened


# ---- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given", ["http://10.0.0.2:8001", "http://10.0.0.2:8001/", "http://10.0.0.2:8001/v1", "http://10.0.0.2:8001/v1/"]
)
def test_the_second_server_s_address_may_end_as_people_write_it(given: str) -> None:
    assert PlayOptions(beside=given).beside == "http://10.0.0.2:8001"
    assert PlayOptions.loads(PlayOptions(beside=given).dumps()) == PlayOptions(beside=given)


@pytest.mark.parametrize(
    "bad", ["", "8001", "file:///etc/passwd", "ftp://h", "http://", "http://u:p@h", "http://h?a=b", "http://h#x", "http://h:x"]
)  # fmt: skip
def test_an_address_that_is_none_is_refused_by_name(bad: str) -> None:
    with pytest.raises(ServerError, match="--play-beside"):
        PlayOptions(beside=bad)


@pytest.mark.parametrize("bad", ["{", "[]", '{"other": 1}'])
def test_settings_that_can_t_be_read_are_named(bad: str) -> None:
    with pytest.raises(ServerError, match="QVL_PLAY"):
        PlayOptions.loads(bad)


def test_a_second_server_is_lent_to_nobody_without_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QVL_GUARD", raising=False)
    monkeypatch.setenv("QVL_PLAY", PlayOptions(beside="http://127.0.0.1:9").dumps())
    with pytest.raises(ServerError, match="guard"):
        Play(FakeVllm())


# ---- the page -------------------------------------------------------------------------------------------------


def test_every_answer_under_play_is_locked_down(start: Start, client: httpx.Client) -> None:
    url = start(FakeVllm(), FakeVllm("second"))
    for method, path, status in [
        ("GET", "/play", 200),
        ("HEAD", "/play", 200),
        ("GET", "/play/play.js", 200),
        ("GET", "/play/play.css", 200),
        ("GET", "/play/sample.png", 200),
        ("GET", "/play/settings.json", 200),
        ("GET", "/play/", 308),
        ("POST", "/play", 405),
        ("GET", "/play/index.html", 404),
        ("GET", "/play/%2e%2e/play.py", 404),
        ("GET", "/play/beside/v1/models", 200),
        ("GET", "/play/beside/v1/chat/completions", 404),
        ("POST", "/play/beside/v1/models", 404),
        ("GET", "/play/beside/metrics", 404),
    ]:
        answer = client.request(method, url + path)
        assert answer.status_code == status, path
        policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["img-src"] == "blob: data:" and "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
    assert client.get(url + "/play/", follow_redirects=True).url == httpx.URL(url + "/play")


def test_the_page_of_a_server_without_keys_goes_by_its_own_names(start: Start, client: httpx.Client) -> None:
    url = start(FakeVllm())
    for path in ("/play", "/play/settings.json"):
        answer = client.get(url + path, headers={"Host": "evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host")
        assert client.get(url + path).status_code == 200
    url = start(FakeVllm(), limits=Limits(api_key="k"))
    assert client.get(f"{url}/play", headers={"Host": "evil.example"}).status_code == 200


def test_files_have_their_types_and_are_sent_once(start: Start, client: httpx.Client) -> None:
    url = start(FakeVllm())
    kinds = {"": "text/html", "/play.js": "text/javascript", "/play.css": "text/css", "/sample.png": "image/png"}
    for name, kind in kinds.items():
        first = client.get(f"{url}/play{name}")
        assert first.headers["content-type"].startswith(kind) and first.content
        again = client.get(f"{url}/play{name}", headers={"if-none-match": first.headers["etag"]})
        assert again.status_code == 304 and again.content == b""
        head = client.head(f"{url}/play{name}")
        assert head.content == b"" and head.headers["content-length"] == str(len(first.content))


def test_the_page_loads_nothing_from_elsewhere_and_holds_no_script_of_its_own() -> None:
    page = resources.files("serve") / "page"
    html = (page / "index.html").read_text()
    assert set(re.findall(r'(?:src|href)="([^"]+)"', html)) == {"play/play.css", "play/play.js"} | set(
        re.findall(r'href="(data:[^"]+)"', html)
    )
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
    assert re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL) == [""]
    script = (page / "play.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|localStorage|cookie", script)
    assert "http" not in re.sub(r"//.*", "", script) and "url(" not in (page / "play.css").read_text()


def test_whatever_is_not_the_page_s_goes_inwards(start: Start, client: httpx.Client) -> None:
    url = start(FakeVllm())
    assert client.get(f"{url}/v1/models").json()["data"][0]["id"] == "demo"
    for path in ("/player", "/", "/playx/y"):  # which the guard refuses
        assert client.get(url + path).json()["error"]["code"] == "route"
    assert client.get(f"{url}/play/beside/v1/models").status_code == 404  # there is none beside


def test_the_page_is_told_the_guard_s_limits_and_no_secret(start: Start, client: httpx.Client) -> None:
    limits = Limits(api_key="sekrit", max_images=3, max_image_pixels=1000, max_tokens=77)
    url = start(FakeVllm(), FakeVllm(), limits)
    answer = client.get(f"{url}/play/settings.json")
    told = answer.json()
    assert told["key"] and told["beside"]
    assert (told["images"], told["image_pixels"], told["max_tokens"], told["token_pixels"]) == (3, 1000, 77, 28 * 28)
    assert "sekrit" not in answer.text and "127.0.0.1" not in answer.text
    assert client.get(f"{url}/play").status_code == 200  # open, as /health is
    assert client.get(f"{url}/v1/models").status_code == 401


# ---- the second server ----------------------------------------------------------------------------------------


def test_the_second_server_answers_as_it_does_by_itself(start: Start, client: httpx.Client) -> None:
    first, second = FakeVllm("first"), FakeVllm("second")
    with serving(second) as direct:
        url = start(first, direct)
        assert client.get(f"{url}/play/beside/v1/models").json() == client.get(f"{direct}/v1/models").json()
        through = client.post(f"{url}/play/beside/v1/chat/completions", json=QUESTION)
        assert through.text == client.post(f"{direct}/v1/chat/completions", json=QUESTION).text
        assert through.headers["content-type"] == "text/event-stream"
    assert not first.asked and [body for _, body in second.asked] == [QUESTION, QUESTION]
    assert client.post(f"{url}/v1/chat/completions", json=QUESTION).is_success and len(first.asked) == 1


def test_only_what_the_second_server_needs_is_sent_to_it(start: Start, client: httpx.Client) -> None:
    second = FakeVllm()
    url = start(FakeVllm(), second, Limits(api_key="k1"))
    headers = {
        "authorization": "Bearer k1",
        "cookie": "a=b",
        "x-forwarded-for": "10.0.0.1",
        "x-request-id": "abc",
        "origin": url,
        "referer": url,
    }
    assert client.post(f"{url}/play/beside/v1/chat/completions?key=k1", json=QUESTION, headers=headers).is_success
    scope = second.asked[0][0]
    sent = {name.decode(): value.decode() for name, value in scope["headers"]}
    assert sent["authorization"] == "Bearer k1" and sent["x-request-id"] == "abc" and scope["query_string"] == b""
    assert not {"cookie", "x-forwarded-for", "origin", "referer"} & set(sent)


def test_the_guard_judges_what_goes_to_the_second_server(start: Start, client: httpx.Client) -> None:
    second = FakeVllm()
    url = start(FakeVllm(), second, Limits(api_key="k1", max_tokens=8, max_body_bytes=2000))
    ask = f"{url}/play/beside/v1/chat/completions"
    key = {"authorization": "Bearer k1"}
    assert client.get(f"{url}/play/beside/v1/models").status_code == 401
    assert client.post(ask, json=QUESTION).status_code == 401
    assert client.post(ask, json=QUESTION, headers={"authorization": "Bearer k2"}).status_code == 401
    assert client.post(ask, json=QUESTION | {"max_tokens": 9}, headers=key).status_code == 400
    assert client.post(ask, json=QUESTION | {"user": "x" * 3000}, headers=key).status_code == 413
    image = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]
    fetching = QUESTION | {"messages": [{"role": "user", "content": image}]}
    assert client.post(ask, json=fetching, headers=key).status_code == 400
    assert second.asked == []
    assert client.post(ask, json=QUESTION, headers=key).is_success and len(second.asked) == 1


def test_its_words_arrive_one_by_one(start: Start, client: httpx.Client) -> None:
    second = FakeVllm()
    url = start(FakeVllm(), second)
    second.goes_on.clear()
    arrived = 0
    with client.stream("POST", f"{url}/play/beside/v1/chat/completions", json=QUESTION) as answer:
        decoder = EventDecoder()
        for event in (event for received in answer.iter_bytes() for event in decoder.feed(received)):
            if b'"content"' in event:
                arrived += 1
                second.goes_on.set()  # the others are not written before the first has arrived
    assert arrived == 3


def test_it_stops_when_the_client_leaves(start: Start, client: httpx.Client) -> None:
    second = FakeVllm()
    url = start(FakeVllm(), second)
    slow = QUESTION | {"messages": [{"role": "user", "content": "slow"}]}
    with client.stream("POST", f"{url}/play/beside/v1/chat/completions", json=slow) as answer:
        next(answer.iter_bytes())
    deadline = time.monotonic() + 5
    while not second.abandoned:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_its_refusals_pass_with_their_advice(start: Start, client: httpx.Client) -> None:
    url = start(FakeVllm(), FakeVllm())
    refused = QUESTION | {"messages": [{"role": "user", "content": "refuse 429 Too many."}]}
    answer = client.post(f"{url}/play/beside/v1/chat/completions", json=refused)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "7"
    assert answer.json()["error"]["message"] == "Too many."


def test_a_second_server_that_is_not_there_is_a_502_that_names_no_address(start: Start, client: httpx.Client) -> None:
    url = start(FakeVllm(), "http://127.0.0.1:9")
    answer = client.post(f"{url}/play/beside/v1/chat/completions", json=QUESTION)
    assert answer.status_code == 502 and "second server" in answer.json()["error"]["message"]
    assert "127.0.0.1" not in answer.text


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (302, [(b"location", b"http://169.254.169.254/latest"), (b"content-type", b"application/json")]),
        (200, [(b"content-type", b"text/html")]),
        (200, []),
    ],
)
def test_redirects_and_pages_are_not_passed_on(
    start: Start, client: httpx.Client, status: int, headers: list[tuple[bytes, bytes]]
) -> None:
    async def other(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"<script>alert(1)</script>"})
        return None

    answer = client.get(f"{start(FakeVllm(), other)}/play/beside/v1/models")
    assert answer.status_code == 502 and "location" not in answer.headers and "alert" not in answer.text
    assert answer.headers["content-type"] == "application/json"


def test_an_answer_that_breaks_off_does_not_look_whole(start: Start, client: httpx.Client) -> None:
    url = start(FakeVllm(), FakeVllm())
    broken = QUESTION | {"messages": [{"role": "user", "content": "break"}]}
    with pytest.raises(httpx.RemoteProtocolError):
        client.post(f"{url}/play/beside/v1/chat/completions", json=broken)


def test_cookies_of_the_second_server_and_its_name_stay_with_it(start: Start, client: httpx.Client) -> None:
    async def chatty(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await lifespan(receive, send)
        headers = [(b"content-type", b"application/json"), (b"set-cookie", b"a=b"), (b"server", b"secret/1.0")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps({"data": []}).encode()})
        return None

    answer = client.get(f"{start(FakeVllm(), chatty)}/play/beside/v1/models")
    assert answer.json() == {"data": []}
    assert "set-cookie" not in answer.headers and answer.headers["server"] == "uvicorn"
