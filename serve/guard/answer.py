"""The answer to a request on its way out: from the engine, a second time where the first failed before it began, ended
when the client leaves or its time is up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.guard.retry import Beginning
from serve.guard.reword import Reworded
from serve.http.errors import Headers, Refusal, error_body

__all__ = ["Answer"]

#: Requests that vLLM failed before it answered, and that were sent to it a second time.
retries = Counter("qvl_retries", "Requests given to the engine a second time.")

#: Seconds beyond its time after which a request is cancelled by force, if the engine has not let go of it.
_FORCE = 10.0
_DISCONNECT = {"type": "http.disconnect"}


class Answer:
    """One answer.

    Args:
        receive: what tells that the client leaves.
        send: to the client.
        headers: further headers of the answer.
        seconds: until the answer must be complete.
        on_start: called when the engine begins to answer, which is when it has read the request.

    Attributes:
        body: the request's body as the engine gets it; empty once it answers.
        late: whether the time was up before the answer was complete.
    """

    def __init__(
        self, receive: Receive, send: Send, headers: Headers, seconds: float, on_start: Callable[[], None]
    ) -> None:
        self._receive, self._send, self._headers, self._on_start = receive, send, headers, on_start
        self._seconds = seconds
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._started = self._streams = self._finished = self._gone = False
        self.body = b""
        self.late = False

    @property
    def started(self) -> bool:
        """Whether the engine has begun to answer."""
        return self._started

    async def give(self, app: ASGIApp, scope: Scope, *, twice: bool = True) -> None:
        """Have the application answer the request of `scope` and `body`, twice if it must and may."""
        send = Reworded(self.send)
        try:
            async with asyncio.timeout_at(self._deadline + _FORCE):
                beginning = Beginning(send)
                try:
                    await self._ask(app, scope, beginning)
                except Exception:  # vLLM has sent its error, and raises it too
                    await beginning.release()
                    raise
                if beginning.failed and twice and not (self.late or self._gone):
                    retries.inc()
                    await self._ask(app, scope, send)
                else:
                    await beginning.release()
        except TimeoutError:
            if not self.late:
                raise

    async def _ask(self, app: ASGIApp, scope: Scope, send: Send) -> None:
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if not replayed:
                replayed = True
                return {"type": "http.request", "body": self.body, "more_body": False}
            return await self.leaves()

        # A scope of its own: vLLM's application writes into it.
        await app(dict(scope), replay, send)

    async def leaves(self) -> Message:
        """Return when the client leaves or its time is up: for vLLM both mean to abort."""
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
                self._gone = message["type"] == "http.disconnect"
                return message
        except TimeoutError:
            self.late = not self._finished
            return _DISCONNECT

    async def send(self, message: Message) -> None:
        """Pass one message of the application's answer on to the client."""
        if self.late:  # vLLM answers nobody, as it believes
            return
        if message["type"] == "http.response.start":
            self._started = True
            self.body = b""  # vLLM has read it
            self._on_start()
            headers = list(message["headers"])
            self._streams = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
            message = {**message, "headers": headers + self._headers} if self._headers else message
        elif not message.get("more_body", False):
            self._finished = True
        await self._send(message)

    async def end_late(self) -> None:
        """Tell the client that its time is up."""
        text = f"The answer was not complete after {self._seconds:g} s."
        if not self._started:
            for message in Refusal(504, "timeout", text).sends(self._headers):
                await self._send(message)
        elif self._streams:
            event = b"data: " + error_body(text, "timeout_error", "timeout") + b"\n\n"
            await self._send({"type": "http.response.body", "body": event})
        # Else the answer was cut in the middle, which uvicorn shows by closing the connection.
