"""report.md: the tables, for a pull request or a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.report import words
from bench.report.schema import Distribution, Fidelity, Report, ServerCounters, SpeedFigure, SpeedPoint, SystemInfo
from bench.roles import ROLES

__all__ = ["render"]

#: Rows and characters a cell: a comment on a pull request holds 65,536.
FLIPS_SHOWN, BRIEF = 60, 160
FIGURES: dict[SpeedFigure, str] = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2e": "E2E",
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "total tokens/s",
    "goodput_per_s": "goodput",
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        # An answer may hold anything; it must neither end a cell nor be taken for a tag.
        plain = (cell.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ") for cell in cells)
        return "| " + " | ".join(plain) + " |"

    return "\n".join([line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows)])


def render(report: Report) -> str:
    """Return the report as markdown."""
    base, cand = report.systems["baseline"], report.systems["candidate"]
    parts = [
        f"# {cand.label} against {base.label}",
        f"**{report.verdict.sentence}**" + (f" {report.verdict.speed}" if report.verdict.speed else ""),
        f"Measured {report.created:%Y-%m-%d %H:%M} UTC in {report.duration_s:.0f} s on {_machine(report)}.",
    ]
    if report.warnings:
        parts.append("\n".join(f"- Note: {warning}." for warning in report.warnings))
    if report.failures:
        rows = [[f.role, f.phase, f.kind, str(f.count), f.message] for f in report.failures]
        parts += ["## Failed requests", _table(["system", "phase", "kind", "count", "message"], rows)]
    if report.accuracy:
        parts += [
            "## Accuracy",
            accuracy_table(report),
            "Intervals are 95%. Lost: right before, wrong now; won: the other way. "
            "p is adjusted for the number of tasks; verdicts are against a margin of "
            f"{words.limit(report.verdict.margin)}.",
        ]
        if report.accuracy.flipped:
            parts += ["## Answers that changed between right and wrong", *flips(report)]
    if report.fidelity:
        parts += ["## Fidelity", fidelity_text(report.fidelity), fidelity_table(report)]
    if report.speed:
        parts += ["## Speed", speed_table(report), "Each cell: p50 / p90 / p99."]
        if report.speed_ratios:
            parts += [ratio_table(report), "Candidate / baseline; of latencies their p50, below 1 is faster. 95%."]
        head, rows_counted = counted(report)
        if head:
            rows = [[point.load.name, report.systems[point.role].label, *cells] for point, cells in rows_counted]
            parts.append(_table(["load", "system", *head], rows))
    if any(system.disk_bytes or system.memory.kv_cache_tokens for system in (base, cand)):
        parts += ["## Size", size_table(report)]
    parts += ["## How it was measured", workload_text(report), f"    {report.environment.command}"]
    parts.append("\n".join(f"- {definition}" for definition in report.definitions.values()))
    return "\n\n".join(parts) + "\n"


def _machine(report: Report) -> str:
    return "; ".join(report.environment.gpus) or report.environment.cpu


def accuracy_table(report: Report) -> str:
    """Accuracy of both systems by task, the overall row last."""
    assert report.accuracy
    rows = []
    for row in [*report.accuracy.tasks, report.accuracy.overall]:
        d = row.difference
        rows.append(
            [
                row.task,
                row.verdict + (f" (needs {words.questions(row.items_needed)})" if row.items_needed else ""),
                str(row.n) + (f" in {row.clusters} clusters" if row.clusters < row.n else ""),
                f"{words.percent(row.baseline.value)} ({words.interval(row.baseline)})",
                f"{words.percent(row.candidate.value)} ({words.interval(row.candidate)})",
                f"{words.points(d.value)} ({words.interval(d)})",
                f"{words.percent(row.recovery.value)} ({words.interval(row.recovery)})" if row.recovery else "–",
                f"{d.lost} / {d.won}",
                words.p_value(row.p_adjusted),
            ]
        )
    base, cand = report.systems["baseline"].label, report.systems["candidate"].label
    return _table(["task", "verdict", "n", base, cand, "difference, points", "recovery", "lost / won", "p"], rows)


def flips(report: Report) -> list[str]:
    """The answers that flipped, as a table, and how many more there are."""
    assert report.accuracy
    flipped = report.accuracy.flipped
    rows = [
        [
            item.flip or "",
            item.id,
            _brief(item.question),
            _brief(words.golds(item)),
            *(_brief(words.answer(getattr(item, role))) for role in ROLES),
        ]
        for item in flipped[:FLIPS_SHOWN]
    ]
    labels = [report.systems[role].label for role in ROLES]
    parts = [_table(["", "item", "question", "right answer", *labels], rows)]
    if len(flipped) > FLIPS_SHOWN:
        parts.append(f"{len(flipped) - FLIPS_SHOWN} more, and the pictures, are in report.html.")
    return parts


def _brief(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= BRIEF else f"{text[: BRIEF - 1]}…"


def _three(distribution: Distribution | None) -> str:
    if distribution is None:
        return "–"
    return " / ".join(words.number(value) for value in (distribution.p50, distribution.p90, distribution.p99))


def fidelity_text(found: Fidelity) -> str:
    """What was asked, in a sentence."""
    return (
        f"{len(found.items)} prompts ({found.source}), answers of at most {found.answer_tokens} tokens, the "
        f"{found.top_k} likeliest tokens at each place. The last column is the baseline's drift from itself."
    )


def fidelity_table(report: Report) -> str:
    """Each measure of fidelity, of the candidate and of the baseline asked again."""
    assert report.fidelity
    base, cand = report.systems["baseline"].label, report.systems["candidate"].label
    rows = [[name, *values] for name, values in words.drift_rows(report.fidelity)]
    return _table(["", cand, f"{base}, asked again"], rows)


def speed_table(report: Report) -> str:
    """Latency and throughput of both systems by load."""
    rows = [
        [
            point.load.name,
            report.systems[point.role].label,
            _three(point.ttft_ms),
            _three(point.tpot_ms),
            _three(point.itl_ms),
            _three(point.e2e_ms),
            "–" if point.output_tokens_per_s is None else words.number(point.output_tokens_per_s),
            words.number(point.requests_per_s),
            f"{point.completed}",
            words.marks(point),
        ]
        for point in report.speed
    ]
    head = ["load", "system", "TTFT ms", "TPOT ms", "ITL ms", "E2E ms", "tokens/s", "requests/s", "n", ""]
    return _table(head, rows)


def ratio_table(report: Report) -> str:
    """Candidate / baseline of each figure, with its interval, by load."""
    loads = list(dict.fromkeys(ratio.load for ratio in report.speed_ratios))
    metrics = [name for name in FIGURES if any(ratio.metric == name for ratio in report.speed_ratios)]
    rows = []
    for load in loads:
        found = [report.ratio(metric, load) for metric in metrics]
        cells = [f"{words.ratio(r.ratio)} ({words.ratio_interval(r.low, r.high)})" if r else "–" for r in found]
        rows.append([load, *cells])
    return _table(["load", *(FIGURES[metric] for metric in metrics)], rows)


def counted(report: Report) -> tuple[list[str], list[tuple[SpeedPoint, list[str]]]]:
    """Goodput, and what the servers and the GPUs counted: names of the columns that some point has, and each point's
    cells."""
    slos = f" under {', '.join(report.workload.slos)}" if report.workload.slos else ""
    columns: dict[str, Callable[[SpeedPoint, ServerCounters], str]] = {
        f"Goodput{slos}, requests/s": lambda point, _: (
            f"{words.number(point.goodput.per_s)} ({words.percent(point.goodput.share)})" if point.goodput else "–"
        ),
        "Cached tokens": lambda _, server: words.percent(server.prefix_cache_share),
        "Cached images": lambda _, server: words.percent(server.image_cache_share),
        "Preemptions": lambda _, server: words.count(server.preemptions),
        "Queue, mean": lambda _, server: words.milliseconds(server.queue_mean_ms),
        "Energy a token": lambda point, _: (
            "–" if point.energy_j_per_token is None else f"{words.number(point.energy_j_per_token)} J"
        ),
    }
    cells = {
        name: [of(point, point.server or ServerCounters()) for point in report.speed] for name, of in columns.items()
    }
    shown = [name for name, column in cells.items() if set(column) != {"–"}]
    if not shown:
        return [], []
    return shown, [(point, [cells[name][at] for name in shown]) for at, point in enumerate(report.speed)]


def size_table(report: Report) -> str:
    """Disk and memory of both systems."""
    systems: list[SystemInfo] = [report.systems[role] for role in ROLES]
    rows = [
        ["stored as", *(s.quantization or "–" for s in systems)],
        ["checkpoint on disk", *(words.gib(s.disk_bytes) for s in systems)],
        ["of it weights", *(words.gib(s.disk_weights_bytes) for s in systems)],
        ["server, host memory", *(words.gib(s.memory.host_bytes) for s in systems)],
        ["server, GPU memory", *(words.gib(s.memory.gpu_bytes) for s in systems)],
        ["weights in memory", *(words.gib(s.memory.weights_bytes) for s in systems)],
        ["KV cache, tokens", *(words.count(s.memory.kv_cache_tokens) for s in systems)],
    ]
    return _table(["", *(s.label for s in systems)], rows)


def _counts(counts: Sequence[int]) -> str:
    """``24``, or ``96 to 288``."""
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def workload_text(report: Report) -> str:
    """What was asked, in a few sentences."""
    work = report.workload
    text = []
    if work.questions:
        text.append(
            f"{work.questions} questions ({work.tasks_source}), temperature 0, natural end, "
            f"at most {work.answer_tokens} tokens, {work.question_concurrency} in flight."
        )
    loads = []
    if work.concurrencies:
        bound = f"{work.duration_s:g} s" if work.duration_s else f"{_counts(work.requests)} requests"
        loads.append(f"closed loops ({bound} a point and system)")
    if work.rates:
        loads.append(f"open loops at {', '.join(f'{rate:g}' for rate in work.rates)} requests/s ({work.arrivals})")
    if work.sweep:
        loads.append(
            f"a sweep (one at a time, {work.sweep_concurrency} in flight, {work.sweep} rates between, {work.arrivals})"
        )
    if loads:
        ramp = f", after a ramp of {work.ramp_s:g} s" if work.ramp_s else ""
        prompt = f"prompts of {work.prompt_tokens} tokens, " if work.prompt_tokens else ""
        pictures = f"pictures of {', '.join(work.image_sizes)}"
        if work.images_per_request != "1":
            pictures += f", {work.images_per_request} a request"
        preset = f"Preset {work.preset}: " if work.preset else "Requests: "
        text.append(
            f"Load: {'; '.join(loads)}, in {work.rounds} rounds{ramp}. {preset}{prompt}{pictures}, exactly "
            f"{work.output_tokens} output tokens (end-of-text is ignored). "
            "Every picture and prompt is new to the server, warm-up inputs are others."
        )
    turns = "in turns, a few questions or one block of load each" if work.interleaved else "one after the other"
    text.append(f"The systems were measured {turns}. Seed {work.seed}.")
    return " ".join(text)
