"""What a run says at its end of what it made: size, drift on held-out answers, the worst, what more would bring.

Nothing is said that this run did not measure. What each unit costs is measured for a layers' report alone: it takes
the samples through the layers once for every unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.console import warn
from toolkit.errors import QvlError
from toolkit.quantize.job import Job
from toolkit.units import human_bytes

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.quantize.journal import Journal
    from toolkit.quantize.progress import RunProgress

__all__ = ["measure", "told", "unit_costs"]

_WORST = 3
#: The share of the size that the verdict says the worth of.
_BUDGET = 0.05


def measure(journal: Journal, checkpoint: Checkpoint, job: Job, progress: RunProgress) -> dict[str, Any]:
    """Measure what the finished layers cost: all together for a verdict, each unit for a report; once for all runs.

    Args:
        journal: with all layers and the rest written.
        checkpoint: the source, an adapter merged.
        job: what is asked.
        progress: is shown what happens.

    Returns:
        "all": ``sums`` and ``tokens`` by answer; "units": ``kl`` by "layer/unit", ``answers``, ``tokens``. What was not
        asked for, or could not be measured, is not there.
    """
    found: dict[str, Any] = {}
    if job.verdict:
        found["all"] = _or_nothing(lambda: journal.once("cost", lambda: _all(journal, checkpoint, job, progress)))
    if job.report is not None:
        found["units"] = _or_nothing(
            lambda: journal.once("unitcost", lambda: _units(journal, checkpoint, job, progress))
        )
    return {name: value for name, value in found.items() if value is not None}


def _or_nothing(make: Any) -> Any:
    """Return what could be measured; a finished checkpoint is not given up for what it lacks to be measured."""
    try:
        return make()
    except QvlError as error:
        warn(f"what the quantization costs could not be measured: {error}")
        return None


def _all(journal: Journal, checkpoint: Checkpoint, job: Job, progress: RunProgress) -> dict[str, Any]:
    from toolkit.quantize.cost import Written, cost_of_all, held_out

    samples = held_out(job.calibration.samples)
    progress.begin("held-out answers", checkpoint.num_layers)
    written = Written(checkpoint, job.recipe, journal.directory, job.source.left)
    cost = cost_of_all(written, samples, job.calibration.turns, _device(job), progress.advance)
    return {"sums": cost.sums, "tokens": cost.tokens}


def _units(journal: Journal, checkpoint: Checkpoint, job: Job, progress: RunProgress) -> dict[str, Any]:
    from toolkit.quantize.cost import Written, cost_of_units, spread

    progress.begin("cost of units", checkpoint.num_layers)
    written = Written(checkpoint, job.recipe, journal.directory, job.source.left)
    samples = spread(job.calibration.samples)
    costs = cost_of_units(written, samples, job.calibration.turns, _device(job), progress.advance)
    return {
        "kl": {f"{layer}/{unit}": kl for (layer, unit), kl in costs.units.items()},
        "answers": costs.answers,
        "tokens": costs.tokens,
    }


def _device(job: Job) -> Any:
    import torch

    return torch.device(job.devices[0])


def unit_costs(cost: Mapping[str, Any]) -> dict[tuple[int, str], float]:
    """Return what `measure` found of units, by layer and unit."""
    parts = ((key.partition("/"), kl) for key, kl in cost["units"]["kl"].items())
    return {(int(layer), unit): float(kl) for (layer, _, unit), kl in parts}


def told(job: Job, cost: Mapping[str, Any], size: int, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the verdict, a line a fact.

    Args:
        job: what was asked.
        cost: from `measure`.
        size: bytes of the weights that were written.
        records: of the decoder layers.
    """
    before = job.source.checkpoint.nbytes
    lines = [f"size: {human_bytes(size)}, {size / before:.0%} of the source's {human_bytes(before)}"]
    if "all" in cost:
        lines.append(_drift(cost["all"]))
    if "units" in cost:
        return [*lines, *_units_told(job, unit_costs(cost), size)]
    worst = sorted(records, key=lambda record: record["relative_error"], reverse=True)[:_WORST]
    named = ", ".join(f"{record['layer']} ({record['relative_error']:.4f})" for record in worst)
    lines.append(f"largest output errors: layers {named}. What each unit costs in KL, --layers-report FILE measures")
    return lines


def _drift(found: Mapping[str, Any]) -> str:
    from toolkit.fidelity.paired import summarize

    kl = summarize(found["sums"], found["tokens"])
    answers = f"{kl.answers} answer{'s' if kl.answers > 1 else ''} ({sum(found['tokens'])} tokens)"
    said = f"KL from the source on {answers} that the search was not made from: {kl.mean.value:.2g} nats a token"
    if kl.answers < 2:
        return f"{said}; one answer tells little"
    return f"{said} [{kl.mean.low:.2g}, {kl.mean.high:.2g}], geometric mean {kl.geometric.value:.2g}"


def _units_told(job: Job, costs: Mapping[tuple[int, str], float], size: int) -> list[str]:
    from toolkit.quantize.search.mixed import extra_bytes, spend

    total = sum(costs.values())
    worst = sorted(costs, key=lambda unit: costs[unit], reverse=True)[:_WORST]
    lines = [
        "worst units, by the KL that each costs alone: "
        + ", ".join(f"{unit} of layer {layer} ({costs[layer, unit]:.2g})" for layer, unit in worst)
    ]
    extra = extra_bytes(job.source.checkpoint, job.recipe.group_size)
    chosen = spend(costs, extra, _BUDGET * size)
    if chosen and total > 0:
        spared = sum(costs[unit] for unit in chosen) / total
        lines.append(
            f"a budget of {_BUDGET:.0%} ({human_bytes(int(_BUDGET * size))}) would leave {len(chosen)} of "
            f"{len(costs)} units in 16 bits, which make up {spared:.0%} of what units cost: "
            f"--from-report {job.report} --budget {_BUDGET}"
        )
    return lines
