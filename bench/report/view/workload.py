"""What was asked, in a few sentences."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.schema import Report

__all__ = ["workload_text"]


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
            f"at most {work.answer_tokens} tokens, {work.question_concurrency} in flight"
            + (f", scored by {work.scoring}'s own rules." if work.scoring != "paper" else ".")
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
        images = f"images of {', '.join(work.image_sizes)}"
        if work.images_per_request != "1":
            images += f", {work.images_per_request} a request"
        preset = f"Preset {work.preset}: " if work.preset else "Requests: "
        text.append(
            f"Load: {'; '.join(loads)}, in {work.rounds} rounds{ramp}. {preset}{prompt}{images}, exactly "
            f"{work.output_tokens} output tokens (end-of-text is ignored). "
            "Every image and prompt is new to the server, warm-up inputs are others."
        )
    turns = "in turns, a few questions or one block of load each" if work.interleaved else "one after the other"
    text.append(f"The systems were measured {turns}. Seed {work.seed}.")
    return " ".join(text)
