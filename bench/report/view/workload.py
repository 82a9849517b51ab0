"""What was asked, in a few sentences."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.schema import Report, Workload

__all__ = ["workload_text"]


def _counts(counts: Sequence[int]) -> str:
    """``24``, or ``96 to 288``."""
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _arrivals(work: Workload) -> str:
    return f"gamma arrivals, burstiness {work.burstiness:g}" if work.arrivals == "gamma" else f"{work.arrivals}"


def _requests(work: Workload) -> str:
    """What requests looked like."""
    if work.traffic:
        length = "as long as recorded" if work.output_tokens == "as in the traffic" else f"{work.output_tokens} tokens"
        return (
            f"Requests: {work.traffic} (SHA-256 {work.traffic_sha256[:12]}), answers exactly {length} (end-of-text is "
            "ignored). Each pass through them is marked, so that no cache knows it from before; what they share among "
            "themselves they share in a pass too."
        )
    prompt = f"prompts of {work.prompt_tokens} tokens, " if work.prompt_tokens else ""
    prompt += f"after {work.shared_prefix} that all have, " if work.shared_prefix else ""
    images = f"images of {', '.join(work.image_sizes)}"
    images += f", {work.images_per_request} a request" if work.images_per_request != "1" else ""
    chats = f"chats of {work.turns} turns, each with the earlier ones before it, " if work.turns > 1 else ""
    new = "Every image and prompt is new to the server"
    if work.turns > 1 or work.shared_prefix:
        shared = ["earlier turns"] * (work.turns > 1) + ["the beginning that all have"] * (work.shared_prefix > 0)
        new += f", but for {' and '.join(shared)}"
    return (
        f"{f'Preset {work.preset}: ' if work.preset else 'Requests: '}{chats}{prompt}{images}, exactly "
        f"{work.output_tokens} output tokens (end-of-text is ignored). {new}; warm-up inputs are others."
    )


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
        loads.append(f"open loops at {', '.join(f'{rate:g}' for rate in work.rates)} requests/s ({_arrivals(work)})")
    if work.replays:
        speeds = ", ".join(f"{speed:g} times as fast" if speed != 1 else "its own times" for speed in work.replays)
        loads.append(f"the recorded trace at {speeds}, another stretch of it in each round")
    if work.sweep:
        loads.append(
            f"a sweep (one at a time, {work.sweep_concurrency} in flight, {work.sweep} rates between, "
            f"{_arrivals(work)})"
        )
    if loads:
        ramp = f", after a ramp of {work.ramp_s:g} s" if work.ramp_s else ""
        text.append(f"Load: {'; '.join(loads)}, in {work.rounds} rounds{ramp}. {_requests(work)}")
    turns = "in turns, a few questions or one block of load each" if work.interleaved else "one after the other"
    text.append(f"The systems were measured {turns}. Seed {work.seed}.")
    return " ".join(text)
