"""Quantize in every way, measure, forget the weights: results are written as they come, and gone on with."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.studies.real_lm.page import write_page
from bench.studies.real_lm.score import Pair, cut
from bench.studies.real_lm.texts import read_held, write_texts
from bench.studies.real_lm.ways import NEAREST, changed, recipe_of
from bench.studies.settings import RealLmSettings
from toolkit.console import note
from toolkit.errors import QvlError
from toolkit.files import write_whole
from toolkit.quantize import quantize

__all__ = ["run"]

#: Seconds that a way is thought to take before one of its effort was timed.
_GUESS = 120.0


def run(step: str, settings: RealLmSettings) -> None:
    """Do a step of the study: ``texts``, ``measure`` or ``table``."""
    if step == "texts":
        for path in write_texts(settings.out, settings.texts):
            note(f"{path}: {len(path.read_text(encoding='utf-8').splitlines())} lines")
    elif step == "measure":
        _measure(settings)
    elif step == "table":
        write_page(settings.out)
    else:
        raise QvlError(f"unknown step {step!r}: choose texts, measure or table")


def _measure(settings: RealLmSettings) -> None:
    """Measure what results.json does not have, as long as there is time."""
    began = time.monotonic()
    if settings.model is None:
        raise QvlError("--model is missing: give the directory of a 16-bit Qwen2-VL")
    ways = settings.ways.split(",")
    for way in ways:
        recipe_of(way)
    results = _Results(settings.out / "results.json")
    todo = [(way, seed) for way in ways for seed in _seeds(way, settings.seeds) if not results.has(_name(way), seed)]
    if not todo:
        note("all is measured")
        return
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    from transformers import AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    draws = cut(tokenizer, read_held(settings.out / "held.jsonl"), settings.sequences, settings.draws)
    pair = Pair(settings.model, device)
    results.describe(device, settings)
    took: dict[str, float] = {}
    for way, seed in todo:
        kind = _name(way).split("+")[0]
        spent = time.monotonic() - began
        if spent + took.get(kind, _GUESS) > 60 * settings.minutes:
            note(f"{way}, seed {seed} and what comes after it would take too long: call again to go on")
            break
        start = time.monotonic()
        measured = _one(pair, way, seed, settings)
        measured["scores"] = [asdict(pair.score(tokens)) for tokens in draws]
        results.add(_name(way), seed, measured)
        took[kind] = time.monotonic() - start
        kl = sum(sum(score["kl"]) / len(score["kl"]) for score in measured["scores"]) / len(draws)
        note(f"{way}, seed {seed}: KL {kl:.5f}, {took[kind]:.0f} s in all")
    if results.found["ways"]:
        write_page(settings.out)


def _seeds(way: str, seeds: int) -> range:
    """Return the calibration seeds that make a difference: none does to rounding to nearest, or to what is made."""
    return range(1 if way.startswith(NEAREST) or "=" in way else seeds)


def _name(way: str) -> str:
    """Return what a way is called in results.json."""
    return way.partition("=")[0]


def _one(pair: Pair, way: str, seed: int, settings: RealLmSettings) -> dict[str, Any]:
    """Quantize in one way into the pair's other model, and return what that took."""
    recipe = recipe_of(way)
    if way.startswith(NEAREST):
        pair.nearest(recipe.get("group_size", 128))
        return {}
    if "=" in way:
        pair.take(Path(way.partition("=")[2]))
        return {}
    assert settings.model is not None
    out = settings.out / "checkpoint"
    calib = str(settings.calib or settings.out / "calib.jsonl")
    began = time.monotonic()
    with changed(way):
        quantize(str(settings.model), out, calib=calib, seed=seed, force=True, restart=True, **recipe)
    seconds = time.monotonic() - began
    pair.take(out)
    ran, manifest = (json.loads((out / name).read_bytes()) for name in ("qvl-run.json", "qvl.json"))
    shutil.rmtree(out)
    choices: dict[str, int] = {}
    for layer in manifest["layers"]:
        for choice in layer["choices"].values():
            choices[choice] = choices.get(choice, 0) + 1
    steps: dict[str, float] = {}
    for layer in ran["layers"]:
        for step, took in layer["seconds"].items():
            steps[step] = round(steps.get(step, 0.0) + took, 3)
    return {
        "seconds": round(seconds, 1),
        "layers_seconds": ran["seconds"]["layers"],
        "steps": steps,
        "peak_device_bytes": ran["peak_device_bytes"],
        "tokens": manifest["calibration"]["tokens"],
        "choices": choices,
        "layer_errors": [layer["relative_error"] for layer in manifest["layers"]],
    }


class _Results:
    """results.json: what was measured, by way and calibration seed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {"ways": {}}

    def has(self, way: str, seed: int) -> bool:
        return str(seed) in self.found["ways"].get(way, {})

    def add(self, way: str, seed: int, measured: dict[str, Any]) -> None:
        self.found["ways"].setdefault(way, {})[str(seed)] = measured
        self._write()

    def describe(self, device: torch.device, settings: RealLmSettings) -> None:
        """Say where and with what it was measured."""
        from toolkit.quantize.model_card import versions

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        self.found["made"] = {"device": name, "versions": versions(), "sequences": settings.sequences}
        self._write()

    def _write(self) -> None:
        write_whole(self.path, json.dumps(self.found, indent=1) + "\n")
