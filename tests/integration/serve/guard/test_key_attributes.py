"""What the attributes of a key in the file do to requests, before an application of the test's own."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from serve.settings.limits import Limits
from tests.support.guard_app import Answer, App, Client, chat, count

USAGE = {"prompt_tokens": 40, "completion_tokens": 10, "total_tokens": 50}
ANSWER = (json.dumps({"choices": [{"message": {"content": "red"}}], "usage": USAGE}).encode(),)
STREAM = (
    b'data: {"choices":[{"delta":{"content":"red"}}],"usage":{"prompt_tokens":40,"completion_tokens":1}}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":40,"completion_tokens":10}}\n\n',
    b"data: [DONE]\n\n",
)


def client(tmp_path: Path, *lines: str, app: App | None = None) -> Client:
    (tmp_path / "keys").write_text("\n".join(lines) + "\n")
    return Client(Limits(api_key_file=str(tmp_path / "keys")), app or App(chunks=ANSWER))


def ask(to: Client, key: str, body: bytes = b"", **options: Any) -> Answer:
    return asyncio.run(to.ask(body=body or chat(), key=key, **options))


def get(to: Client, path: str, key: str) -> Answer:
    return asyncio.run(to.ask("GET", path, key=key))


def refused(answer: Answer, status: int, code: str) -> bool:
    return (answer.status, answer.error["code"]) == (status, code)


def test_a_key_for_metrics_asks_no_model(tmp_path: Path) -> None:
    to = client(tmp_path, "k0", "k1 name=prometheus scope=metrics", "k2 scope=models")
    before = count("scope")
    assert get(to, "/metrics", "k1").status == 200
    reached = len(to.app.requests)
    assert refused(ask(to, "k1"), 403, "scope")
    assert refused(get(to, "/metrics", "k2"), 403, "scope")
    assert len(to.app.requests) == reached and count("scope") == before + 2
    assert ask(to, "k2").status == 200 and ask(to, "k0").status == 200 and get(to, "/metrics", "k0").status == 200


def test_a_key_for_some_models(tmp_path: Path) -> None:
    to = client(tmp_path, "k1 scope=models:charts,m", "k2")
    assert ask(to, "k1").status == 200  # its model is m
    assert refused(ask(to, "k1", chat(model="other")), 403, "scope")
    assert refused(ask(to, "k1", b'{"messages": [{"role": "user", "content": "Hi"}]}'), 403, "scope")
    assert refused(ask(to, "k1", b'{"model": "o", "prompt": "x"}', path="/v1/completions"), 403, "scope")
    assert ask(to, "k2", chat(model="other")).status == 200


def test_models_that_a_key_is_not_for_are_not_listed(tmp_path: Path) -> None:
    listed = {"object": "list", "data": [{"id": "base", "parent": None}, {"id": "charts", "parent": "base"}]}
    to = client(tmp_path, "k1 scope=models:charts", "k2", app=App(chunks=(json.dumps(listed).encode(),)))
    answer = get(to, "/v1/models", "k1")
    assert json.loads(answer.body) == {"object": "list", "data": [{"id": "charts", "parent": None}]}
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert json.loads(get(to, "/v1/models", "k2").body) == listed
    assert json.loads(get(to, "/v1/models/charts", "k1").body) == {"id": "charts", "parent": None}
    assert json.loads(get(to, "/v1/models/charts", "k2").body) == {"id": "charts", "parent": "base"}
    assert refused(get(to, "/v1/models/base", "k1"), 404, "model")


def test_a_key_that_has_expired_is_told_so(tmp_path: Path) -> None:
    today = datetime.now(UTC).date()
    to = client(tmp_path, f"k1 expires={today - timedelta(days=1)}", f"k2 expires={today}")
    guesses = count("key")
    answer = ask(to, "k1")
    assert refused(answer, 401, "key_expired") and answer.headers["www-authenticate"] == "Bearer"
    assert count("key") == guesses  # it is no guess
    assert ask(to, "k2").status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_spent_budget(tmp_path: Path, stream: bool) -> None:
    app = App(chunks=STREAM, content_type=b"text/event-stream") if stream else App(chunks=ANSWER)
    name = f"budget-{stream}"
    to = client(tmp_path, f"k1 name={name} tokens-per-day=100", "k2", app=app)
    assert to.guard._keys is not None
    to.guard._keys._look = to.guard._keys._next_look = 0.0  # it looks each time
    body = chat(stream=stream)
    for _ in range(2):
        answer = ask(to, "k1", body)
        assert answer.status == 200 and (b"usage" in answer.body) != stream
    spent = ask(to, "k1", body)
    assert refused(spent, 429, "tokens") and 0 < int(spent.headers["retry-after"]) <= 86_400
    assert ask(to, "k2", body).status == 200 and get(to, "/v1/models", "k1").status == 200
    written = tmp_path / "new"
    written.write_text(f"k3 name={name} tokens-per-day=100\nk4 name={name} tokens-per-day=101\n")
    written.replace(tmp_path / "keys")  # a new key of the same name has no new budget, unless it says so
    assert refused(ask(to, "k3", body), 429, "tokens") and ask(to, "k4", body).status == 200
    assert ask(to, "k1", body).status == 401
    assert REGISTRY.get_sample_value("qvl_key_tokens_total", {"key": name, "kind": "prompt"}) == 120
    assert REGISTRY.get_sample_value("qvl_key_tokens_total", {"key": name, "kind": "completion"}) == 30
    assert REGISTRY.get_sample_value("qvl_key_requests_total", {"key": name}) == 3


def test_who_leaves_has_used_what_was_sent(tmp_path: Path) -> None:
    app = App(chunks=STREAM[:1], content_type=b"text/event-stream", pause=60)
    to = client(tmp_path, "k1 name=leaver tokens-per-day=41", app=app)
    ask(to, "k1", chat(stream=True), leaves_after=0.05)
    assert app.aborted == 1
    assert refused(ask(to, "k1", chat(stream=True)), 429, "tokens")


def test_what_is_known_of_a_request_is_left_for_its_line(tmp_path: Path) -> None:
    to = client(tmp_path, "k1 name=ann")
    notes: dict[str, Any] = {}
    parts = [{"type": "text", "text": "What?"}]
    ask(to, "k1", chat(messages=[{"role": "user", "content": parts}]), scope={"qvl": notes})
    assert notes == {"key": "ann", "prompt_tokens": 40, "completion_tokens": 10, "images": 0}
    assert os.fspath(tmp_path) not in json.dumps(notes)
