"""The verb that judges what another harness measured: judge. Heavy imports live inside the functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bench.judge.verdict import Comparison, Verdict

__all__ = ["register"]

_ALL = "all"


def register(app: typer.Typer) -> None:
    """Add the verb to ``app``."""
    app.command(rich_help_panel="Measurement")(judge)


def judge(
    baseline: Annotated[Path, typer.Argument(help="lmms-eval's output of the 16-bit model, run with --log_samples.")],
    candidate: Annotated[Path, typer.Argument(help="The same of the quantized model.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="[TASK=]NAME", help="Which metric is the score, where a task has several. Repeatable."),
    ] = None,
    margin: Annotated[float, typer.Option(help="Loss, in points, that would not matter.")] = 1.0,
    out: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")] = None,
) -> None:
    """Judge two runs of lmms-eval question by question: no worse, worse, or can't tell.

    Its own logs are enough; nothing is measured again. Exits 1 when the candidate is worse beyond chance, over all
    questions or in one task, 2 when the runs can't be paired.
    """
    from bench.cli.compare import exit_on
    from bench.judge.verdict import compare, judge_tasks
    from bench.judge.verdict import judge as judge_one
    from bench.questions.lmms_logs import pair, read_logs
    from toolkit.console import note, warn
    from toolkit.console import out as stdout
    from toolkit.errors import BenchError
    from toolkit.files import write_whole

    if not 0 < margin < 100:
        raise BenchError(f"--margin {margin:g}: give points above 0 and below 100, as to qvl bench")
    margin /= 100
    runs = [read_logs(path, metric or ()) for path in (baseline, candidate)]
    pairs = pair(*runs)
    for task in sorted(runs[0].keys() ^ runs[1].keys()):
        warn(f"{task} is left out: only one of the runs has it")
    found = {task: compare(each.before, each.after, seed=0) for task, each in pairs.items()}
    verdicts = judge_tasks(found, margin)
    both = [sum((getattr(each, side) for each in pairs.values()), ()) for side in ("before", "after")]
    whole = compare(*both, seed=0)
    found[_ALL], verdicts[_ALL] = whole, judge_one(whole, margin)
    stdout.print(_table(found, verdicts))
    note("scored by " + ", ".join(f"{each.metric} ({task})" for task, each in pairs.items()))
    for task, verdict in verdicts.items():
        if verdict.items_needed:
            note(f"{task}: about {verdict.items_needed:,} questions would tell")
    note(
        "lmms-eval's logs do not say which questions share an image: each counts by itself here, which makes intervals "
        "a little narrow where they do"
    )
    if out is not None:
        told = {task: _figures(found[task], verdicts[task]) for task in found}
        write_whole(out, json.dumps({"margin": margin, "tasks": told}, indent=1) + "\n")
    exit_on([f"{task}: worse beyond chance" for task, each in verdicts.items() if each.judgement == "worse"], [])


def _table(found: dict[str, Comparison], verdicts: dict[str, Verdict]) -> Any:
    from bench.report import words
    from toolkit.tables import table

    heads = ["task", "n", "before", "after", "points (95% interval)", "lost/won", "verdict"]
    shown = table(heads, range(1, len(heads)))
    for task, row in found.items():
        shown.add_row(
            task,
            f"{row.n:,}",
            words.percent(row.baseline.value),
            words.percent(row.candidate.value),
            f"{words.points(row.difference.value)} ({words.points(row.difference.low)} … "
            f"{words.points(row.difference.high)})",
            f"{row.flips.lost}/{row.flips.won}",
            verdicts[task].judgement,
            style="bold" if task == _ALL else None,
        )
    return shown


def _figures(found: Comparison, verdict: Verdict) -> dict[str, Any]:
    return {
        "n": found.n,
        "baseline": found.baseline.value,
        "candidate": found.candidate.value,
        "difference": [found.difference.value, found.difference.low, found.difference.high],
        "lost": found.flips.lost,
        "won": found.flips.won,
        "p_value": verdict.p_value,
        "verdict": verdict.judgement,
        "items_needed": verdict.items_needed,
    }
