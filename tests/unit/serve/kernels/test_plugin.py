"""The plugin never raises, and vLLM finds it by its entry point."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import pytest

from serve.kernels.plugin import register


def test_vllm_finds_it() -> None:
    (found,) = (point for point in entry_points(group="vllm.general_plugins") if point.name == "qvl")
    assert found.load() is register


def test_another_vllm_is_a_line_of_the_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)  # as if there were none
    register()
    assert "qvl's kernels are left out (ModuleNotFoundError" in caplog.text
