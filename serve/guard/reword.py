"""vLLM's errors in words that help whoever reads them: its own name flags of `vllm serve`, which nobody typed here."""

from __future__ import annotations

from starlette.types import Message, Send

from serve.http.errors import error_response

__all__ = ["TOOL_CALLS", "Reworded"]

#: What vLLM's messages about tool_choice name, be it "auto", "required" or a function.
_MARK = b"--tool-call-parser"
TOOL_CALLS = (
    "This server does not parse tool calls. Send tool_choice none, or have its operator start it with: "
    "qvl serve MODEL ... -- --enable-auto-tool-choice --tool-call-parser hermes."
)


class Reworded:
    """Passes an answer on; holds one of status 400 until it is whole, and says what it says in other words."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self._body = b""

    async def __call__(self, message: Message) -> None:
        """Take the next ASGI message of the answer."""
        if message["type"] == "http.response.start" and message["status"] == 400:
            self._start = message
            return
        if self._start is None:
            await self._send(message)
            return
        self._body += message.get("body", b"")
        if message.get("more_body", False):
            return
        messages: list[Message] = [self._start, {"type": "http.response.body", "body": self._body}]
        if _MARK in self._body:
            messages = list(error_response(400, TOOL_CALLS, "invalid_request_error", "field", "tool_choice"))
        self._start = None
        for each in messages:
            await self._send(each)
