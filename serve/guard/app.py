"""The guard of a public server: an ASGI middleware before vLLM's app that lets nothing in which was not thought of.

    client -> host -> key -> route and method -> what the key is for -> rate -> body (size, time) -> JSON
        -> fields, texts, images -> turns (pixels, grammars) -> vLLM

What fails is refused with an error in OpenAI's shape, counted in `qvl_refusals_total{reason}`, and never reaches vLLM.
What passes is cancelled in the engine when its client leaves or its time is up. Nothing of a request is logged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.compat import limit_headers
from serve.guard.answer import Answer
from serve.guard.body import Checked, Checker
from serve.guard.budget import Grammars, Pixels, pixels_for
from serve.guard.fetch import Fetcher
from serve.guard.hosts import Hosts
from serve.guard.keys import Key, Keys, check_key, check_model
from serve.guard.listing import Listing
from serve.guard.models import answer_model
from serve.guard.parse import parse
from serve.guard.rate import Clients
from serve.guard.recorder import Recorder
from serve.guard.upload import ClientGone, Held, Upload
from serve.guard.usage import Ledger, Usage, images_in
from serve.http.errors import Headers, Refusal
from serve.http.metrics import refusals
from serve.http.middleware import Middleware
from serve.settings.environment import GUARD
from serve.settings.limits import Limits
from toolkit.errors import ServerError
from toolkit.host import memory_limit

__all__ = ["Guard"]

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_GENERATING = (_CHAT, _COMPLETIONS)
_MODELS = "/v1/models"
#: Method of each route that a client with a key may use.
_ROUTES = {_CHAT: "POST", _COMPLETIONS: "POST", _MODELS: "GET", "/metrics": "GET", "/version": "GET"}
#: What load balancers ask, without a key.
_OPEN = frozenset({"/health", "/ready"})
#: Headers that vLLM gets to see. It would let a client choose a data-parallel rank with others.
_INNER_HEADERS = frozenset(
    {
        b"host",
        b"content-type",
        b"accept",
        b"user-agent",
        b"authorization",
        b"x-request-id",
        b"traceparent",
        b"tracestate",
    }
)


class Guard(Middleware):
    """ASGI middleware; its settings are the environment variable QVL_GUARD, see `serve.settings.limits.Limits`.

    Raises ServerError when that is absent or the key file can't be read: no server is better than an open one.
    """

    def __init__(self, app: ASGIApp, limits: Limits | None = None, fetcher: Fetcher | None = None) -> None:
        if limits is None:
            if GUARD not in os.environ:
                raise ServerError(f"{GUARD} is not set: start the server with `qvl serve`.")
            limits = Limits.loads(os.environ[GUARD])
        super().__init__(app)
        self._limits = limits
        path = None if limits.api_key_file is None else Path(limits.api_key_file)
        self._keys = Keys(path, limits.api_key) if limits.needs_key else None
        self._ledger = Ledger()
        self._clients = Clients(limits.rate_per_minute, limits.max_concurrency)
        self._checker = Checker(limits)
        self._fetcher = fetcher or Fetcher(limits.image_hosts, limits.max_image_bytes, limits.image_fetch_seconds)
        self._routes = _ROUTES | {path: method for method, _, path in (r.partition(" ") for r in limits.allow_routes)}
        self._origins = frozenset(origin.encode() for origin in limits.cors_origins)
        self._held = Held(limits)
        self._hosts = None if limits.needs_key else Hosts(limits.hosts, limits.cors_origins)
        self._pixels = Pixels(limits.max_decoded_pixels or pixels_for(memory_limit()))
        self._grammars = Grammars()
        self._recorder = Recorder.from_environment()
        limit_headers(
            lambda reason: refusals.labels(reason).inc(), limits.max_connections, limits.max_address_connections
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of any kind that ASGI knows."""
        if scope["type"] == "http":
            await _Request(self, scope, receive, send).serve()
        elif scope["type"] == "websocket":
            await self._refuse_websocket(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    @staticmethod
    async def _refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
        refusals.labels("route").inc()
        await receive()  # its opening
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008})  # not accepted yet: the client sees a bare 403
            return
        for message in Refusal(403, "route", "There are no websockets here.").sends():
            await send(message | {"type": f"websocket.{message['type']}"})


class _Request:
    """One HTTP request on its way through the guard."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self.guard, self.limits = guard, guard._limits
        self.scope, self.receive, self.send = scope, receive, send
        self.state: dict[str, Any] = scope.setdefault("qvl", {"id": "", "key": None, "refused": None})
        self.path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        self.headers: dict[bytes, bytes] = {}
        self.repeated: set[bytes] = set()
        for name, value in scope["headers"]:
            if name in self.headers:
                self.repeated.add(name)
            self.headers[name] = value
        self.key: Key | None = None
        self.cors = self._cors()
        #: What ends this request's share of what all have together.
        self.turns: list[Callable[[], None]] = []
        self.upload = Upload(self.headers, receive, self.limits, guard._held)

    async def serve(self) -> None:
        """Refuse the request or hand it on."""
        try:
            await self._serve()
        except Refusal as refusal:
            await self._refuse(refusal)
        except ClientGone:
            pass
        finally:
            self._let_go()

    async def _serve(self) -> None:
        method: str = self.scope["method"]
        if self.path in _OPEN and method in ("GET", "HEAD"):
            await self.guard.app({**self.scope, "method": "GET"}, self.receive, self.send)
            return
        if self.guard._hosts is not None:
            self.guard._hosts.check(self.scope)
        if method == "OPTIONS" and self.cors and b"access-control-request-method" in self.headers:
            await self._preflight()
            return
        name = self._client()
        model = self.path.removeprefix(f"{_MODELS}/") if self.path.startswith(f"{_MODELS}/") else ""
        expected = self.guard._routes.get(_MODELS if model else self.path)
        if expected is None:
            raise Refusal(404, "route", "There is no such route here.")
        if method != expected and not (method == "HEAD" and expected == "GET"):
            allowed = expected if expected == "POST" else "GET, HEAD"
            raise Refusal(
                405, "method", f"This route takes {allowed} only.", headers=[(b"allow", allowed.encode())]
            )  # fmt: skip
        if self.key is not None:
            check_key(self.key, _MODELS if model else self.path)
        if model:
            await self._get_model(model)
            return
        if expected == "GET":
            await self._get()
            return
        if self.key is not None:
            self.guard._ledger.check(self.key)
        self.guard._clients.enter(name)
        try:
            await self._post(name)
        finally:
            self.guard._clients.leave(name)

    def _client(self) -> str:
        """Return under which name the request's client is counted; refuse one without a key that is let in."""
        keys = self.guard._keys
        if keys is None:
            client = self.scope.get("client")
            return client[0] if client else ""
        scheme, _, key = self.headers.get(b"authorization", b"").partition(b" ")
        self.key = keys.find(key.strip())
        if self.key is None or scheme.lower() != b"bearer" or b"authorization" in self.repeated:
            raise Refusal(
                401,
                "key",
                "Give a key that this server knows in the header: Authorization: Bearer KEY.",
                headers=[(b"www-authenticate", b"Bearer")],
            )
        self.state["key"] = self.key.name
        return self.key.name

    async def _get(self) -> None:
        """Have vLLM answer, which it does in no time, without its engine."""
        send = self.send
        if self.path == _MODELS and self.key is not None and self.key.models is not None:
            send = Listing(self.key.models, send).send
        # uvicorn leaves out the body where HEAD was asked.
        await self.guard.app(self._inner_scope("GET"), self.receive, self._answer(send).send)

    async def _get_model(self, model: str) -> None:
        models = None if self.key is None else self.key.models
        await answer_model(self.guard.app, self._inner_scope("GET"), self._answer().send, model, models)

    async def _post(self, name: str) -> None:
        usage = Usage(self.send)
        answer = self._answer(usage.send)
        body = await self.upload.read()
        request = parse(body, self.limits)
        if self.key is not None:
            check_model(self.key, request)
        checker = self.guard._checker
        fetch = self.guard._fetcher.fetch
        if self.path == _CHAT:
            checked = await checker.chat(request, body, fetch)
        elif self.path == _COMPLETIONS:
            checked = checker.completion(request, body)
        else:
            checked = await checker.other(self.path, request, body, fetch)
        recorder = self.guard._recorder if self.path == _CHAT and not self.state.get("beside") else None
        messages = request.get("messages") if recorder else None
        if self.path in _GENERATING:
            self.state["images"] = images_in(request)
            if not self.state.get("beside"):  # another server's answer, which counts for itself
                checked = replace(checked, body=usage.counting(request, checked.body))
        del request, body
        self.turns.append(self.guard._pixels.enter(checked.pixels))
        recorded = recorder.begin(messages) if recorder else None
        del messages
        try:
            await self._compiled(name, checked, answer)
            answer.body = checked.body
            inner = self._inner_scope("POST", len(checked.body))
            twice = checked.attached or not checked.schemas
            del checked  # the answer lets go of the body when the engine has read it
            await answer.give(self.guard.app, inner, twice=twice)
        finally:
            self.state |= {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion}
            if recorder:
                recorder.end(recorded, usage.completion)
            if self.key is not None:
                self.guard._ledger.add(self.key.name, usage)
            if answer.late:
                self._count("timeout")
                await answer.end_late()

    async def _compiled(self, name: str, checked: Checked, answer: Answer) -> None:
        """Wait for this client's turn to have a grammar compiled."""
        end = await self.guard._grammars.enter(name, checked.schemas, checked.schema_states, answer.leaves)
        self.turns.append(lambda: end(answer.started))

    def _let_go(self) -> None:
        """Hold nothing longer: the engine answers, or there is no answer."""
        self.upload.let_go()
        for end in self.turns:
            end()
        self.turns.clear()

    def _answer(self, send: Send | None = None) -> Answer:
        return Answer(self.receive, send or self.send, self.cors, self.limits.request_seconds, self._let_go)

    def _inner_scope(self, method: str, length: int | None = None) -> Scope:
        headers = [header for header in self.scope["headers"] if header[0] in _INNER_HEADERS]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        return {**self.scope, "method": method, "headers": headers}

    def _count(self, reason: str) -> None:
        self.state["refused"] = reason
        refusals.labels(reason).inc()

    async def _refuse(self, refusal: Refusal) -> None:
        self._count(refusal.reason)
        self.upload.let_go()
        unread = self.upload.unread
        start, body = refusal.sends([*self.cors, (b"connection", b"close")] if unread else self.cors)
        await self.send(start)
        if not unread or refusal.reason == "body_time":
            await self.send(body)
            return
        await self.send(body | {"more_body": True})
        await self.upload.skip()
        await self.send({"type": "http.response.body", "body": b""})

    def _cors(self) -> Headers:
        """Return the headers that let a page of another origin read the answer, if its origin is one that may.

        Not starlette's CORSMiddleware: that answers any origin's preflight itself, before the guard could refuse and
        count it, with a text as body, and adds headers to the answers of clients that send no origin.
        """
        origin = self.headers.get(b"origin")
        if origin is None or origin not in self.guard._origins:
            return []
        return [(b"access-control-allow-origin", origin), (b"vary", b"origin")]

    async def _preflight(self) -> None:
        headers = [
            *self.cors,
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type, x-request-id, traceparent, tracestate"),
            (b"access-control-max-age", b"600"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})
