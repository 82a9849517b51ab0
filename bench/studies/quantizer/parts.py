"""The parts of the benchmark, each a function of the settings that returns what stands in results.json.

A part runs in a process of its own (:mod:`bench.studies.quantizer.work`), so that one's memory does not count to
another.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from bench.cli.commands import run
from bench.studies.quantizer import inputs
from bench.studies.quantizer.settings import Settings
from toolkit.console import note
from toolkit.errors import BenchError, ResourceError

__all__ = ["PART_FUNCTIONS"]

#: Every run that is reported has these, what the command line's own defaults are or not.
_OURS = {"search": "moments", "scaling": "plain", "rounding": "compensated"}
_GROUP = 128


def speed(settings: Settings) -> dict[str, Any]:
    """Measure seconds a layer, memory and errors of layers of the 2B's and 7B's shape, ours beside stock AutoAWQ."""
    shapes = {}
    for shape in ("2b",) if settings.tiny else ("2b", "7b"):
        model = inputs.random_model(settings, shape, settings.layers, channels=True)
        manifest = inputs.text_manifest(settings, model, settings.samples, seed=1)
        held_out = inputs.text_manifest(settings, model, settings.held_out, seed=2)
        tokens = [sample.inputs["input_ids"][0].tolist() for sample in inputs.prepared(model, manifest)]
        systems: dict[str, Any] = {}
        written: dict[str, Path] = {}
        for name, rounding in (("ours", "compensated"), ("ours, nearest", "nearest")):
            written[name] = settings.work / f"{model.name}-{rounding}"
            note(f"{shape}: {name}")
            systems[name] = _quantize(model, written[name], manifest, settings.samples, {"rounding": rounding})
        if settings.stock_python:
            note(f"{shape}: stock AutoAWQ")
            lengths = {len(ids) for ids in tokens}
            if len(lengths) > 1:
                raise BenchError(f"samples of {min(lengths)} to {max(lengths)} tokens: stock AutoAWQ would cut them")
            ids = settings.work / "ids.json"
            ids.write_text(json.dumps(tokens), encoding="utf-8")
            written["stock"] = settings.work / f"{model.name}-stock"
            job = {"model": model, "out": written["stock"], "ids": ids, "group_size": _GROUP, "duo": True}
            systems["stock"] = _stock(settings, [job])[0]
        shapes[shape] = {
            "tokens": sum(map(len, tokens)),
            "samples": len(tokens),
            "held_out_tokens": settings.held_out * settings.tokens,
            "systems": systems,
            "errors": _errors(model, held_out, {k: v for k, v in written.items() if "failed" not in systems[k]}),
        }
        for path in written.values():
            shutil.rmtree(path, ignore_errors=True)
    return {"group_size": _GROUP, "shapes": shapes}


def full(settings: Settings) -> dict[str, Any]:
    """Time the whole command on a whole model of the 7B's shape, with images."""
    model, manifest = inputs.random_model(settings, "7b"), inputs.image_manifest(settings, settings.samples)
    out = settings.work / "full"
    return _command(settings, model, manifest, out)


def wide(settings: Settings) -> dict[str, Any]:
    """Measure memory and time of layers of the 72B's width."""
    model = inputs.random_model(settings, "72b", 2)
    manifest = inputs.text_manifest(settings, model, settings.samples, seed=1)
    found = _quantize(model, settings.work / "wide", manifest, settings.samples)
    shutil.rmtree(settings.work / "wide")
    return found


def cost(settings: Settings) -> dict[str, Any]:
    """Time a layer against the number of samples, and against the layer's width."""
    shapes = ("2b",) if settings.tiny else ("2b", "7b", "72b")
    models = {
        shape: inputs.random_model(settings, shape, 2 if shape == "72b" else settings.layers, channels=shape != "72b")
        for shape in shapes
    }
    out = settings.work / "cost"

    def point(model: Path, samples: int) -> dict[str, Any]:
        from toolkit.checkpoint.checkpoint import Checkpoint

        note(f"{model.name}: {samples} samples")
        manifest = inputs.text_manifest(settings, model, samples, seed=1)
        run = _quantize(model, out, manifest, samples)
        shutil.rmtree(out)
        weights = sum(k * n for k, n in Checkpoint.open(model).linear_shapes().values())
        return {"samples": samples, "tokens": run["calibration"]["tokens"], "weights": weights, **run}

    narrow = "2b" if settings.tiny else "7b"
    by_samples = [point(models[narrow], samples) for samples in settings.cost_samples]
    by_width = []
    for shape, model in models.items():
        same = [p for p in by_samples if shape == narrow and p["samples"] == settings.samples]
        by_width.append({"shape": shape, **(same[0] if same else point(model, settings.samples))})
    return {"shape": narrow, "samples": by_samples, "width": by_width}


def quality(settings: Settings) -> dict[str, Any]:
    """Measure the embedded model after every way to quantize it."""
    import torch
    from safetensors.torch import save_file

    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.paths import demo_checkpoint
    from toolkit.tasks.manifests import write_calibration

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = demo_checkpoint()
    manifest = write_calibration(settings.work / f"chats-{settings.samples}", settings.samples)
    samples = inputs.prepared(model, manifest)
    groups = (128, 64)
    candidates: list[tuple[str, int, Checkpoint | int | str]] = [("round to nearest", g, g) for g in groups]
    about_stock: dict[str, Any] = {}
    if settings.stock_python:
        batch = settings.work / "batch.safetensors"
        pad = json.loads((model / "generation_config.json").read_text())["pad_token_id"]
        save_file(inputs.padded_batch(samples, pad), batch)
        jobs: list[dict[str, Any]] = [
            {"model": model, "out": settings.work / f"stock-{g}-{duo:d}", "batch": batch, "group_size": g, "duo": duo}
            for g in groups
            for duo in (True, False)
        ]
        for job, report in zip(jobs, _stock(settings, jobs), strict=True):
            name = f"stock AutoAWQ, {'duo' if job['duo'] else 'plain'}"
            made = report.get("failed") or Checkpoint.open(job["out"])
            candidates.append((name, job["group_size"], made))
            about_stock = {key: report[key] for key in ("device", "versions")}
    ways: dict[str, dict[str, str]] = {
        "AutoAWQ's search in our pipeline, duo": {"search": "autoawq", "scaling": "duo", "rounding": "nearest"},
        "AutoAWQ's search in our pipeline, plain": {"search": "autoawq", "scaling": "plain", "rounding": "nearest"},
        "ours, nearest": {"rounding": "nearest"},
        "ours": {},
    }
    for name, options in ways.items():
        for group in groups:
            note(f"{name}, groups of {group}")
            out = settings.work / f"quality-{len(candidates)}"
            _quantize(model, out, manifest, settings.samples, {**options, "group_size": group})
            candidates.append((name, group, Checkpoint.open(out)))

    from bench.studies.quantizer.quality import Examiner

    torch.backends.cuda.matmul.allow_tf32 = False  # the quantizer turned it on, and here it would cost precision
    examiner = Examiner(settings.per_task, settings.chats_per_task, device)
    methods = []
    for name, group, candidate in candidates:
        note(f"examining {name}, groups of {group}")
        found = {"failed": candidate} if isinstance(candidate, str) else examiner.examine(candidate)
        methods.append({"name": name, "group_size": group, **found})
    calibration = {"samples": len(samples), "tokens": sum(s.tokens for s in samples)}
    return {"source": examiner.source(), "methods": methods, "calibration": calibration, "stock": about_stock}


def devices(settings: Settings) -> dict[str, Any]:
    """Time the same model on one GPU and on two, and compare what they write."""
    import torch

    from toolkit.checkpoint.checkpoint import Checkpoint

    if torch.cuda.device_count() < 2:
        raise BenchError(f"two GPUs are needed for this part, and there are {torch.cuda.device_count()}")
    model, manifest = inputs.random_model(settings, "7b"), inputs.image_manifest(settings, settings.samples)
    runs, hashes = {}, set()
    for name in ("0", "0,1"):
        out = settings.work / "devices"
        runs[name] = _command(settings, model, manifest, out, ["--devices", name])
        hashes.add(Checkpoint.open(out).content_hash())
        shutil.rmtree(out)
    return {"runs": runs, "identical": len(hashes) == 1}


def backoff(settings: Settings) -> dict[str, Any]:
    """Quantize with less GPU memory than the first micro-batch wants, and hear what is said of it."""
    import torch

    from toolkit.quantize import shares

    if not torch.cuda.is_available():
        raise BenchError("a GPU is needed for this part: memory is taken from it")
    model = inputs.random_model(settings, "7b", settings.layers, channels=True)
    manifest = inputs.text_manifest(settings, model, settings.samples, seed=1)
    # nearest: of compensated rounding the factor is what takes most, and no micro-batch makes it smaller
    options = {"rounding": "nearest"}
    whole = _quantize(model, settings.work / "whole", manifest, settings.samples, options)
    told: list[str] = []
    total = torch.cuda.get_device_properties(0).total_memory
    limits = []
    for less in (0.5e9, 1e9, 1.5e9, 2e9):
        limit = whole["peak_device_bytes"] - less
        torch.cuda.set_per_process_memory_fraction(limit / total)
        told.clear()
        try:
            with mock.patch.object(shares, "note", told.append):
                run = _quantize(model, settings.work / "less", manifest, settings.samples, options)
        except ResourceError as error:
            run = {"failed": str(error)}
        limits.append({"limit_bytes": limit, "notes": [n for n in told if "out of memory" in n], **run})
    torch.cuda.set_per_process_memory_fraction(1.0)
    return {"whole": whole, "limits": limits}


PART_FUNCTIONS = {
    "speed": speed,
    "full": full,
    "wide": wide,
    "cost": cost,
    "quality": quality,
    "devices": devices,
    "backoff": backoff,
}


def _quantize(
    model: Path, out: Path, manifest: Path, samples: int, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Quantize in this process; ``out`` stays. Returns the facts of the run, see :func:`_facts`."""
    import torch

    from toolkit.quantize import quantize

    settings = {**_OURS, "group_size": _GROUP, **(options or {})}
    quantize(str(model), out, calib=str(manifest), samples=samples, force=True, restart=True, **settings)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _facts(out)


def _command(settings: Settings, model: Path, manifest: Path, out: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Quantize with `qvl quantize` as a user would; ``wall`` is the seconds from its start to its end."""
    chosen = [word for key, value in _OURS.items() for word in (f"--{key}", value)]
    command = ["--model", model, "--out", out, "--calib", manifest, "--samples", settings.samples, *chosen]
    command += ["--group-size", _GROUP, "--restart", "--force", *more]
    began = time.perf_counter()
    code = run(["quantize", *command])
    wall = time.perf_counter() - began
    if code:
        raise BenchError(f"qvl quantize ended with code {code}")
    return {"wall": round(wall, 2), **_facts(out)}


def _facts(out: Path) -> dict[str, Any]:
    """Return what is reported of a run, from qvl-run.json and qvl.json."""
    run = json.loads((out / "qvl-run.json").read_text(encoding="utf-8"))
    calibration = json.loads((out / "qvl.json").read_text(encoding="utf-8"))["calibration"]
    return {
        "layers": run["layers"],
        "seconds": run["seconds"],
        "peak_device_bytes": run["peak_device_bytes"],
        "peak_host_bytes": run["peak_host_bytes"],
        "planned": run["planned"],
        "calibration": {key: calibration[key] for key in ("samples", "tokens", "vision_tokens")},
        "output_bytes": sum(file.stat().st_size for file in out.iterdir()),
    }


def _stock(settings: Settings, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run jobs under stock AutoAWQ, in the environment that was named for it, and return their reports."""
    assert settings.stock_python is not None
    for number, job in enumerate(jobs):
        shutil.rmtree(job["out"], ignore_errors=True)
        job["report"] = settings.work / f"stock-report-{number}.json"
        job["report"].unlink(missing_ok=True)
    file = settings.work / "stock-jobs.json"
    file.write_text(json.dumps(jobs, default=str), encoding="utf-8")
    script = Path(__file__).with_name("stock.py")
    # without the script's own directory among the places that modules come from: ours are there
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    code = subprocess.call([*shlex.split(settings.stock_python), str(script), str(file)], env=environment)
    lost = {"failed": f"the process ended with code {code}", "device": "", "versions": {}}
    return [json.loads(job["report"].read_text(encoding="utf-8")) if job["report"].is_file() else lost for job in jobs]


def _errors(model: Path, held_out: Path, written: dict[str, Path]) -> dict[str, list[float]]:
    """Return the layers' relative errors of rounding to nearest and of each written checkpoint."""
    import torch

    from bench.studies.quantizer.errors import layer_errors, load_model
    from toolkit.checkpoint.checkpoint import Checkpoint

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    candidates: dict[str, Checkpoint | int] = {"round to nearest": _GROUP}
    candidates |= {name: Checkpoint.open(path) for name, path in written.items()}
    source = load_model(model, device)
    found = layer_errors(source, candidates, inputs.prepared(model, held_out))
    del source
    gc.collect()
    torch.cuda.empty_cache()
    return found
