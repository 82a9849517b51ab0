"""What was measured as a profile that `qvl serve` uses, as a table, and in words."""

from __future__ import annotations

import datetime
from collections.abc import Container, Sequence
from typing import Any

from bench.load.workload import written
from bench.machine.environment import system_name, versions
from bench.tune.config import TuneConfig
from bench.tune.journal import FP16, Journal, Trial
from serve.plan.candidates import DEFAULT
from serve.settings.engine import EngineSettings
from serve.settings.profiles import Key, Measured, Profile

__all__ = ["profile_of", "recommendation", "table_rows"]

#: The figure that decides.
_WHAT = "output_tokens_per_s"


def profile_of(
    key: Key, config: TuneConfig, journal: Journal, settings: dict[str, dict[str, Any]], command: str
) -> Profile | None:
    """Make a profile of what was measured; None when nothing was.

    Args:
        key: what it is for.
        settings: of the candidates, by name.
        command: the command line, as it is to be shown.
    """
    loads = _measured(config, journal, settings)
    if not loads:
        return None
    measured = {name for load in loads for name in load.figures}
    provenance = {
        "what": f"closed loop, {_asked(config)}",
        "when": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "versions": versions(),
        "system": system_name(),
        "failed": {name: t.failed for name, t in journal.trials.items() if t.failed},
        "figures": {name: journal.trials[name].figures for name in sorted(measured)},
    }
    kept = {name: EngineSettings.read(settings[name]) for name in settings if name in measured}
    return Profile(key, kept, tuple(loads), _WHAT, provenance)


def _measured(config: TuneConfig, journal: Journal, settings: Container[str]) -> list[Measured]:
    loads = []
    for load in config.concurrencies:
        found = {
            name: t.figures[load][_WHAT] for name, t in journal.trials.items() if load in t.figures and name in settings
        }
        plain = found.pop(FP16, None)
        if found:
            loads.append(Measured(load, found, plain))
    return loads


def _asked(config: TuneConfig) -> str:
    """What the requests were, in words."""
    if config.questions:
        return f"questions of {config.questions.name}, {config.output_tokens} output tokens at most"
    return f"{config.output_tokens} output tokens, images of {', '.join(map(written, config.image_sizes))}"


def table_rows(trials: Sequence[Trial], loads: Sequence[int]) -> list[tuple[str, list[str]]]:
    """Return each trial's cells: output tokens/s at each load, the best of a load marked; then why it failed."""
    best = {
        load: max((t.figures[load][_WHAT] for t in trials if load in t.figures and t.name != FP16), default=0)
        for load in loads
    }
    rows = []
    for trial in trials:
        cells = []
        for load in loads:
            figures = trial.figures.get(load)
            if figures is None:
                cells.append("")
                continue
            speed = figures[_WHAT]
            mark = "*" if trial.name != FP16 and speed == best[load] else ""
            cells.append(f"{speed:,.4g}{mark}")
        rows.append((trial.name, [*cells, (trial.failed or "").splitlines()[0] if trial.failed else ""]))
    return rows


def recommendation(profile: Profile) -> list[str]:
    """Return what was found, a line a load: the winner, against vLLM's own settings and against fp16."""
    lines, losing = [], []
    for load in profile.loads:
        name = profile.winner(load.concurrency)
        said = f"{load.concurrency} in flight: {name} ({profile.candidates[name]})"
        if DEFAULT in load.figures and name != DEFAULT:
            said += f", {load.figures[name] / load.figures[DEFAULT]:.2f}x vLLM's own settings"
        if load.fp16 is not None:
            factor = load.figures[name] / load.fp16
            said += f", {factor:.2f}x fp16"
            if factor < 1:
                losing.append(load.concurrency)
        lines.append(said)
    if losing and profile.key.format != "fp16":
        where = "at every load" if len(losing) == len(profile.loads) else f"at {', '.join(map(str, losing))} in flight"
        lines.append(f"fp16 is faster {where}: serve it there if it fits the card; AWQ then saves memory, not time.")
    names = {mode: profile.chosen(mode) for mode in ("latency", "throughput", "auto")}
    lines.append("--profile " + ", ".join(f"{mode}: {name}" for mode, name in names.items()))
    return lines
