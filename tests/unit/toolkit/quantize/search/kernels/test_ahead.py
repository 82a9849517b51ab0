"""Kernels are compiled beside what comes before the search: those of one GPU's recipe, and none of a CPU's."""

from __future__ import annotations

import threading

import pytest
import torch

from toolkit.quantize.recipe import Recipe
from toolkit.quantize.search import clips, compensate
from toolkit.quantize.search.kernels import ahead


def test_a_gpus_are_compiled_in_a_thread_that_ends_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[torch.device, str]] = []

    def compile_slowly(device: torch.device, recipe: Recipe) -> None:
        go.wait(60)
        compiled.append((device, threading.current_thread().name))

    go = threading.Event()
    monkeypatch.setattr(ahead, "_compile", compile_slowly)
    with ahead.compiled_ahead(["cuda:0"], Recipe()):
        assert not compiled
        go.set()
    assert compiled == [(torch.device("cuda:0"), "kernels")]


@pytest.mark.parametrize("devices", [["cpu"], ["cuda:0", "cuda:1"]])
def test_none_are_for_a_cpu_or_for_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, devices: list[str]) -> None:
    monkeypatch.setattr(ahead, "_compile", lambda *_: pytest.fail("compiled"))
    with ahead.compiled_ahead(devices, Recipe()):
        pass


@pytest.mark.parametrize(
    ("recipe", "wanted"),
    [
        (Recipe(), ["rounding", "clips of 128"]),
        (Recipe(group_size=64, rounding="nearest"), ["clips of 64"]),
        (Recipe(clip=False), ["rounding"]),
        (Recipe(search="autoawq"), []),
    ],
)
def test_those_of_the_recipe(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, wanted: list[str]) -> None:
    asked: list[str] = []
    monkeypatch.setattr(compensate, "has_rounding_kernel", lambda device: asked.append("rounding"))
    monkeypatch.setattr(clips, "has_clip_kernel", lambda device, group: asked.append(f"clips of {group}"))
    ahead._compile(torch.device("cpu"), recipe)
    assert asked == wanted
