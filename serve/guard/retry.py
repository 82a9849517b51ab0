"""A second try for a request that vLLM failed before it answered anything.

vLLM's front end and its engine each keep a list of images that the engine has. A client that leaves at the wrong
moment makes them differ, and the next request with that image, anyone's, fails with an internal error; vLLM mends its
lists and expects the request to be sent again (`MultiModalCacheMissError` in vLLM 0.32). That is done here, once.
What fails for a schema's sake and has no images fails again: that is left out (`serve.guard.app`).
"""

from __future__ import annotations

import json

from starlette.types import Message, Send

__all__ = ["Beginning"]

#: The event that a chat's stream begins with, before the engine's first token or error is in it.
_ROLE_ONLY = b'"delta":{"role":"assistant","content":""'
_ERROR = b'data: {"error"'


def _code(event: bytes) -> int:
    """Return the status of an error that is a stream's event: what the client did is not tried again."""
    try:
        code = json.loads(event.partition(b"\n")[0].removeprefix(b"data: "))["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return 500
    return code if isinstance(code, int) else 500


class Beginning:
    """Holds an answer back until it has begun well, which is with its first token; then lets everything pass.

    It delays nothing: vLLM sends what comes before the first token together with it.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[Message] | None = []
        self._stream = False
        #: Whether it began with an error; all of the answer is held then.
        self.failed = False

    async def __call__(self, message: Message) -> None:
        """Take the next ASGI message of the answer."""
        if self._held is None:
            await self._send(message)
            return
        self._held.append(message)
        if not self.failed and self._decided(message):
            await self.release()

    def _decided(self, message: Message) -> bool:
        if message["type"] == "http.response.start":
            self.failed = message["status"] == 500
            self._stream = any(
                n == b"content-type" and v.startswith(b"text/event-stream") for n, v in message["headers"]
            )
            return not self.failed and not self._stream
        body: bytes = message.get("body", b"")
        self.failed = body.startswith(_ERROR) and _code(body) >= 500
        return not self.failed and not (_ROLE_ONLY in body and message.get("more_body", False))

    async def release(self) -> None:
        """Send what is held."""
        held, self._held = self._held or [], None
        for message in held:
            await self._send(message)
