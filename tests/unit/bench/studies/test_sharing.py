"""Servers beside each other: how much of the card each is given, and that all end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.studies.sharing import all_up, beside_others
from serve.process import lifecycle
from serve.settings import backend
from serve.settings.backend import Gpu
from serve.settings.config import ServerConfig
from tests.support import tiny
from toolkit.errors import ServerError

GIB = 2**30
H100 = [Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 80 * GIB)]


def test_a_server_on_a_shared_card_has_the_cache_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.write(tmp_path / "model")
    monkeypatch.setattr(backend, "find_gpus", lambda: H100)
    found = beside_others(model, ServerConfig(backend="gpu", max_model_len=64, extra=("--seed", "1")), 0.25)
    assert found.extra == ("--seed", "1", "--kv-cache-memory-bytes", str(GIB // 4))
    assert found.gpu_memory_utilization is not None and 0.02 < found.gpu_memory_utilization < 0.04
    few = beside_others(model, ServerConfig(backend="gpu", max_model_len=64), 1e-9)
    assert int(few.extra[1]) >= 64 * 2 * 2 * 2 * 32 * 2  # a sequence: tokens, K and V, layers, heads, their size, bytes
    on_cpu = ServerConfig(backend="cpu")
    assert beside_others(model, on_cpu, 0.25) is on_cpu


def test_those_that_came_up_are_handed_over_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []

    def start(model: str, options: ServerConfig, *, attached: bool) -> SimpleNamespace:
        assert attached
        if model == "bad":
            raise ServerError("it died")
        return SimpleNamespace(url=model, stop=lambda drain: stopped.append(model))

    monkeypatch.setattr(lifecycle, "start", start)
    starts = {name: (name, ServerConfig(backend="cpu")) for name in ("good", "bad", "other")}
    with pytest.raises(KeyError, match="asked"), all_up(starts) as servers:
        assert str(servers["bad"]) == "it died" and stopped == []
        raise KeyError("asked")
    assert stopped == ["good", "other"]
