"""What goes beside the weights of a finished checkpoint: config, side files, qvl.json, what was measured, a card."""

from __future__ import annotations

from typing import Any

from toolkit.checkpoint.compressed import quantization_config
from toolkit.checkpoint.config import untied
from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.checkpoint.left_out import ignored, modules_to_not_convert
from toolkit.quantize.job import Job, Made
from toolkit.quantize.journal import Journal
from toolkit.quantize.model_card import model_card, versions
from toolkit.quantize.tower import stage_numbers
from toolkit.quantize.verdict import unit_costs

__all__ = ["write_rest"]

MANIFEST_VERSION = 2
#: What is told of the distillation that is about one run.
_OF_A_RUN = ("seconds", "peak_device_bytes")


def write_rest(journal: Journal, job: Job, made: Made, seconds: dict[str, float]) -> None:
    """Write all but weights and side files into a journal that has those, and the layers' report.

    Args:
        journal: with all layers done.
        job, made: what was asked, and what came of it.
        seconds: that were taken so far, by step.
    """
    records = journal.records()
    manifest = _manifest(job, made, records)
    journal.set_config(_config(job, made))
    journal.write_json("qvl.json", manifest)
    journal.write_json("qvl-run.json", _measured(job, made, seconds, len(journal.done)))
    journal.write_text("README.md", model_card(manifest, job.source.checkpoint.family.model_type))
    if job.report is not None:
        from toolkit.quantize.report import write_report

        decoder = records[: job.source.checkpoint.num_layers]
        costs = unit_costs(made.cost) if "units" in made.cost else {}
        write_report(job.report, decoder, manifest, list(job.source.checkpoint.family.fused), costs)


def _config(job: Job, made: Made) -> dict[str, Any]:
    """Return the config.json of what was quantized with what engines read of the quantization."""
    config = untied(made.config) if job.recipe.lm_head else made.config
    return {
        **_in_16_bits(config),
        "quantization_config": _quantization(job),
    }


def _quantization(job: Job) -> dict[str, Any]:
    checkpoint, recipe, left = job.source.checkpoint, job.recipe, job.source.left
    tower = job.source.tower_left
    if LAYOUTS[recipe.format].method == "compressed-tensors":
        entries = ignored(left, checkpoint.num_layers, checkpoint.family, recipe.lm_head, tower)
        return quantization_config(recipe.group_size, entries, recipe.lm_head)
    return {
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        **({"lm_head": True} if recipe.lm_head else {}),
        "modules_to_not_convert": modules_to_not_convert(left, checkpoint.num_layers, checkpoint.family, tower),
        "quant_method": "awq",
        "version": recipe.format,
        "zero_point": True,
    }


def _in_16_bits(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config that says fp16 where it said fp32, as the weights are then (`toolkit.checkpoint.values`)."""
    said = {key: value for key, value in config.items() if key in ("dtype", "torch_dtype") and value == "float32"}
    nested = {key: _in_16_bits(value) for key, value in config.items() if isinstance(value, dict)}
    return {**config, **nested, **dict.fromkeys(said, "float16")}


def _manifest(job: Job, made: Made, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return qvl.json: nothing in it differs from run to run."""
    layers, stages = job.source.checkpoint.num_layers, len(stage_numbers(job.source.checkpoint, job.recipe))
    head = records[-1] if job.recipe.lm_head else None
    return {
        "manifest_version": MANIFEST_VERSION,
        "source": {**job.source.told, "hash": made.hash},
        "recipe": job.recipe.recorded(),
        "left_in_16_bits": job.source.left_in_words,
        "calibration": job.calibration.record,
        "versions": versions(),
        "vision_sensitivity": None if made.balance is None else [round(ratio, 6) for ratio in made.balance],
        "distillation": _told_of_distillation(made.distillation, of_a_run=False),
        "layers": [{key: value for key, value in layer.items() if key != "errors"} for layer in records[:layers]],
        "vision": [
            {key: value for key, value in stage.items() if key != "layer"}
            for stage in records[layers : layers + stages]
        ],
        "lm_head": head and {key: value for key, value in head.items() if key != "module"},
    }


def _told_of_distillation(found: dict[str, Any] | None, *, of_a_run: bool) -> dict[str, Any] | None:
    """Return what is about one run, or what is the same in all."""
    return None if found is None else {key: value for key, value in found.items() if (key in _OF_A_RUN) == of_a_run}


def _measured(job: Job, made: Made, seconds: dict[str, float], earlier: int) -> dict[str, Any]:
    """Return qvl-run.json: what the run cost. ``earlier``: how many layers an earlier run had finished."""
    ends, plan = made.outcome.ends, job.plan
    return {
        "versions": versions(),
        "device": ", ".join(end.device for end in ends),
        "seconds": {
            **{step: round(took, 3) for step, took in seconds.items()},
            **{step: max((end.seconds[step] for end in ends), default=0.0) for step in ("embed", "layers")},
        },
        "peak_device_bytes": max((end.peak_device_bytes for end in ends), default=0),
        "peak_host_bytes": max((end.peak_host_bytes for end in ends), default=0),
        "distillation": _told_of_distillation(made.distillation, of_a_run=True),
        "planned": {"device_bytes": plan.device, "host_bytes": plan.host, "seconds": plan.seconds},
        "cost": made.cost,
        "layers_of_earlier_runs": earlier,
        "layers": [{"layer": layer.layer, "seconds": layer.seconds} for layer in made.outcome.layers],
    }
