"""What the project's ASGI middleware has in common: the application that it stands before."""

from __future__ import annotations

from starlette.types import ASGIApp

__all__ = ["Middleware", "innermost"]


class Middleware:
    """Base of the classes that `vllm serve --middleware` is given; each wraps the one before it.

    Attributes:
        app: the application inside this one.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app


def innermost(app: ASGIApp) -> ASGIApp:
    """Return the application inside all of the project's middleware: vLLM's own."""
    while isinstance(app, Middleware):
        app = app.app
    return app
