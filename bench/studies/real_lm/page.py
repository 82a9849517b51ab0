"""results.json as a table: each way's divergence, and its ratio to AutoAWQ's search and to the default, paired."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.judge.stats import Interval, mean_interval
from toolkit.errors import QvlError
from toolkit.files import write_whole

__all__ = ["ratio", "write_page"]

#: What ways are held against.
_BASELINES = ("autoawq", "fast")
#: Resamples of the intervals.
_RESAMPLES = 2_000

Floats = npt.NDArray[np.float64]


def write_page(out: Path) -> None:
    """Write README.md beside results.json, and print the table.

    Raises:
        QvlError: nothing is measured yet.
    """
    path = out / "results.json"
    if not path.is_file():
        raise QvlError(f"no {path}: `python -m bench.studies real-lm measure` makes it")
    found = json.loads(path.read_bytes())
    text = "\n".join(_lines(found)) + "\n"
    write_whole(out / "README.md", text)
    print(text)


def ratio(candidate: Floats, baseline: Floats) -> tuple[Interval, Interval]:
    """Return mean over mean of paired divergences [n], and the geometric mean of their ratios, with 95% intervals.

    Sequences are resampled with both their divergences.
    """
    rng = np.random.default_rng(0)
    picks = rng.integers(len(candidate), size=(_RESAMPLES, len(candidate)))
    draws = candidate[picks].mean(1) / baseline[picks].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    logs = mean_interval(np.log(candidate / baseline).tolist(), seed=0, resamples=_RESAMPLES)
    means = Interval(float(candidate.mean() / baseline.mean()), float(low), float(high))
    return means, Interval(*(math.exp(end) for end in (logs.value, logs.low, logs.high)))


def _lines(found: dict[str, Any]) -> list[str]:
    ways = {way: list(seeds.values()) for way, seeds in found["ways"].items()}
    kl = {way: _by_sequence(runs, "kl") for way, runs in ways.items()}
    baselines = [way for way in _BASELINES if way in kl]
    source = float(np.mean([score["source_loss"] for runs in ways.values() for run in runs for score in run["scores"]]))
    made = found.get("made", {})
    versions = [f"{package} {version}" for package, version in made.get("versions", {}).items()]
    sequences = len(next(iter(kl.values())))
    heads = [f"to {way}, {kind}" for way in baselines for kind in ("means", "geo")]
    lines = [
        "# Ways of quantizing on real weights",
        "",
        f"Written by `python -m bench.studies real-lm`. {', '.join([made.get('device', ''), *versions])}.",
        f"{sequences} held-out sequences, 384 tokens each; divergence from the 16-bit source in nats a token, averaged "
        f"over calibration seeds (one by one in brackets). Perplexity of the source: {math.exp(source):.4f}. Ratios "
        "are paired, with 95% intervals over sequences.",
        "",
        "| way | seeds | mean KL | p99 | top-1 | perplexity | " + "".join(f"{head} | " for head in heads) + "seconds |",
        "|---" * (7 + len(heads)) + "|",
    ]
    for way, runs in ways.items():
        scores = [score for run in runs for score in run["scores"]]
        p99, top1 = (float(np.mean([score[name] for score in scores])) for name in ("p99", "top1"))
        loss = float(np.mean([score["loss"] for score in scores]))
        held = []
        for base in baselines:
            held += [_told(interval) for interval in ratio(kl[way], kl[base])] if base != way else ["1", "1"]
        spread = " ".join(f"{np.mean(_by_sequence([run], 'kl')):.5f}" for run in runs)
        seconds = " ".join(f"{run['seconds']:.0f}" for run in runs if "seconds" in run)
        row = [
            way,
            str(len(runs)),
            f"{kl[way].mean():.5f} ({spread})",
            f"{p99:.3f}",
            f"{top1:.2%}",
            f"{math.exp(loss):.4f}",
        ]
        lines.append("| " + " | ".join([*row, *held, seconds]) + " |")
    return lines


def _by_sequence(runs: list[dict[str, Any]], name: str) -> Floats:
    """Return each sequence's mean, over calibration seeds: [sequences of all draws]."""
    by_run = [np.concatenate([np.asarray(score[name]) for score in run["scores"]]) for run in runs]
    mean: Floats = np.mean(by_run, axis=0)
    return mean


def _told(found: Interval) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
