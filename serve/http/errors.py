"""Errors as OpenAI's API sends them, as ASGI messages: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

__all__ = ["Headers", "Refusal", "error_body", "error_response"]

#: Names, in lower case, and values.
Headers = list[tuple[bytes, bytes]]

_TYPES = {401: "authentication_error", 429: "rate_limit_error", 503: "server_error", 504: "timeout_error"}


class Refusal(Exception):
    """A request that is not let through.

    Args:
        status: HTTP status.
        reason: one of `serve.settings.limits.REASONS`; becomes the error's code.
        message: what was wrong and what to do. Nothing of a prompt, an image or a key.
        param: the request's field that is at fault.
        headers: further headers of the response, names in lower case.
    """

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        param: str | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.param, self.headers = status, reason, message, param, headers

    def sends(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> list[dict[str, Any]]:
        """Return the ASGI messages that say so."""
        type = _TYPES.get(self.status, "invalid_request_error")
        return error_response(self.status, self.message, type, self.reason, self.param, [*self.headers, *headers])


def error_body(message: str, type: str, code: str | int, param: str | None = None) -> bytes:
    """Return the JSON of an error; `param` names the request's field that is at fault."""
    return json.dumps({"error": {"message": message, "type": type, "param": param, "code": code}}).encode()


def error_response(
    status: int,
    message: str,
    type: str,
    code: str | int,
    param: str | None = None,
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> list[dict[str, Any]]:
    """Return the two ASGI messages of an error response, to be sent in order.

    Args:
        status: HTTP status.
        message: what was wrong and what to do, for a human.
        type: OpenAI's class of error, such as "invalid_request_error" or "rate_limit_error".
        code: what programs look at; here a refusal's reason.
        param: the request's field that is at fault.
        headers: further headers, names in lower case.
    """
    body = error_body(message, type, code, param)
    always = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return [
        {"type": "http.response.start", "status": status, "headers": [*always, *headers]},
        {"type": "http.response.body", "body": body},
    ]
