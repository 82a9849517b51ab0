"""What is changed of other packages is still what it was when the changes were written.

Where one of these fails after an upgrade: read the new source, see whether the change is still needed and still does
what it says, run tests/integration/serve/test_compat.py and an e2e test, then set the release in serve/compat.py.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

from serve.compat import _METHODS, UVICORN, VLLM, bound_headers
from serve.settings.backend import installed_vllm


def release(full: str) -> str:
    return ".".join(full.split(".")[:2])


def test_uvicorn_is_the_release_that_is_known() -> None:
    assert release(version("uvicorn")) == UVICORN


def test_the_class_of_uvicorn_s_has_the_methods_that_are_wrapped() -> None:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    parameters = {name: list(inspect.signature(getattr(HttpToolsProtocol, name)).parameters)[1:] for name in _METHODS}
    assert {name: len(found) for name, found in parameters.items()} == {
        "connection_lost": 1,
        "connection_made": 1,
        "data_received": 1,
        "handle_websocket_upgrade": 0,
        "on_body": 1,
        "on_header": 2,
        "on_headers_complete": 0,
        "on_message_complete": 0,
        "on_response_complete": 0,
        "pause_writing": 0,
        "resume_writing": 0,
        "send_400_response": 1,
    }


def test_vllm_is_the_release_that_is_known() -> None:
    build = installed_vllm()
    if build is None:
        pytest.skip("vLLM is not installed")
    assert release(build[1]) == VLLM


def test_vllm_s_registry_asks_its_helper_process_by_that_function() -> None:
    """Read, not imported: importing vLLM takes seconds."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vLLM is not installed")
    tree = ast.parse((Path(spec.origin).parent / "model_executor" / "models" / "registry.py").read_text("utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "_run_in_subprocess"]
    assert [[argument.arg for argument in function.args.args] for function in functions] == [["fn"]]
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_run_in_subprocess"
    ]
    assert calls and all(len(call.args) == 1 and not call.keywords for call in calls)


def test_a_class_without_those_methods_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Unknown:
        pass

    assert not bound_headers(Unknown, lambda reason: None)
    assert "not limited" in caplog.text and not hasattr(Unknown, "qvl_bounded")
