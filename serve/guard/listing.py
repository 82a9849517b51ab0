"""What /v1/models lists for a key that is for some models only."""

from __future__ import annotations

import json
from collections.abc import Set

from starlette.types import Message, Send

__all__ = ["Listing"]


class Listing:
    """Passes one answer of /v1/models on, without the models that the key is not for: clients take the first."""

    def __init__(self, models: Set[str], send: Send) -> None:
        self._models, self._send = models, send
        self._start: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        """Take the next ASGI message of the answer."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False) or self._start is None:
            return
        body = self._listed() if self._start["status"] == 200 else self._body
        headers = [(name, value) for name, value in self._start["headers"] if name != b"content-length"]
        await self._send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await self._send({"type": "http.response.body", "body": body})

    def _listed(self) -> bytes:
        found = json.loads(self._body)
        # An adapter's base is another name, which the key may not be for.
        kept = [model for model in found["data"] if model["id"] in self._models]
        for model in kept:
            if model.get("parent") not in self._models:
                model["parent"] = None
        return json.dumps({**found, "data": kept}).encode()
