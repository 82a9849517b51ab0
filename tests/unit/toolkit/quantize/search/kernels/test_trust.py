"""A kernel that does not run or rounds wrongly is not used, and that is said once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from toolkit.quantize.search.kernels import trust as kernels

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_found", {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


def test_one_that_agrees_is_asked_once() -> None:
    asked: list[int] = []

    def agrees() -> bool:
        asked.append(1)
        return True

    assert kernels.trusted("rounding", GPU, agrees) and kernels.trusted("rounding", GPU, agrees)
    assert len(asked) == 1


def test_who_asks_while_one_is_compiled_waits_for_that() -> None:
    asked: list[int] = []
    begun, go = threading.Event(), threading.Event()

    def agrees() -> bool:
        asked.append(1)
        begun.set()
        return go.wait(60)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(kernels.trusted, "rounding", GPU, agrees)
        assert begun.wait(60)
        second = pool.submit(kernels.trusted, "rounding", GPU, agrees)
        go.set()
        assert first.result() and second.result()
    assert len(asked) == 1


def test_one_that_is_wrong_or_does_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    def breaks() -> bool:
        raise RuntimeError("no such instruction")

    for what, agrees in (("rounding", lambda: False), ("clips", breaks)):
        assert not kernels.trusted(what, GPU, agrees) and not kernels.trusted(what, GPU, agrees)
    told = capsys.readouterr().err
    assert told.count("is not used on cuda:0, plain torch is") == 2
    assert "its results are wrong" in told and "RuntimeError: no such instruction" in told


def test_a_cpu_has_none() -> None:
    assert not kernels.trusted("rounding", torch.device("cpu"), lambda: True)
