"""The way from the outermost middleware to vLLM's application."""

from __future__ import annotations

import importlib
import inspect

import pytest
from starlette.types import Receive, Scope, Send

from serve.app.ready import Proof
from serve.http.middleware import Middleware, innermost
from serve.settings.arguments import middleware
from serve.settings.config import ServerConfig
from serve.settings.limits import Limits

ALL = middleware(ServerConfig(backend="cpu", guard=Limits(), play=True, play_beside="http://127.0.0.1:8001"))


async def vllm(scope: Scope, receive: Receive, send: Send) -> None:
    """Stands for vLLM's application."""


def test_the_way_ends_at_the_first_application_that_is_not_ours() -> None:
    class Foreign:
        """Has an `app` too, and is not passed through."""

        def __init__(self) -> None:
            self.app = vllm

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)

    foreign = Foreign()
    assert innermost(vllm) is vllm
    assert innermost(Middleware(Proof(vllm))) is vllm  # type: ignore[arg-type]  # the base itself answers nothing
    assert innermost(Proof(foreign)) is foreign


@pytest.mark.parametrize("name", ALL)
def test_every_middleware_that_vllm_is_given_can_be_passed_through(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert issubclass(found, Middleware) and inspect.iscoroutinefunction(found.__call__)
