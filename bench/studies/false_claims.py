"""How often a report claims what is not there, and finds what is: many runs of two servers that are known.

    python -m bench.studies false-claims --out docs/results/false-claims

Request times are drawn, not waited for: what a server of known speed would give a client, under the noise that a
machine adds. Everything behind that is what `qvl bench` does with what it measured: rounds, pairs, intervals,
headlines, verdicts.
"""

from __future__ import annotations

import heapq
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from bench.load.client import Trace
from bench.load.loops import Block
from bench.load.workload import Lengths
from bench.studies.settings import FalseClaimsSettings

__all__ = ["Noise", "Server", "accuracy_claims", "run", "simulated", "speed_claims"]

#: Requests in flight, and of each load and round: the defaults of `qvl bench`.
LOADS = {1: 12, 4: 12, 16: 48}
OUTPUT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Noise:
    """What a machine adds, as standard deviations of logarithms.

    Attributes:
        block: of all requests of a system in a round: what the machine does meanwhile, other in each.
        drift: of a step of the random walk that the machine takes from block to block, warm or busy for both.
        request: of each request's pace.
    """

    block: float = 0.025
    drift: float = 0.01
    request: float = 0.03


@dataclass(frozen=True, slots=True)
class Server:
    """Seconds to the first token and between two, for one request alone; each other that is in flight adds a share."""

    first_s: float = 0.08
    token_s: float = 0.01
    share: float = 0.04

    def slower(self, factor: float) -> Server:
        """Return one that takes so many times as long."""
        return Server(self.first_s * factor, self.token_s * factor, self.share)


def simulated(
    server: Server, in_flight: int, count: int, rng: np.random.Generator, machine: float, noise: Noise
) -> Block:
    """Return a closed loop of ``count`` requests on a machine that makes everything ``machine`` times as slow."""
    free = [0.0] * min(in_flight, count)
    heapq.heapify(free)
    crowd = 1.0 + server.share * (in_flight - 1)
    traces = []
    for number in range(count):
        due = heapq.heappop(free)
        pace = machine * crowd * math.exp(rng.normal(0.0, noise.request))
        first = due + server.first_s * pace * math.exp(rng.normal(0.0, 2 * noise.request))
        chunks = tuple(first + server.token_s * pace * step for step in range(OUTPUT_TOKENS))
        traces.append(Trace(due, due, chunks[-1], chunks, "", 64, OUTPUT_TOKENS, "length", number=number))
        heapq.heappush(free, chunks[-1])
    return Block(tuple(traces), max(trace.ended for trace in traces))


def speed_claims(servers: dict[str, Server], rounds: int, seed: int, noise: Noise) -> dict[str, Any]:
    """Run one bench of two servers; return what its headlines claim, and what any interval would have claimed.

    Returns:
        ``headlines``: by figure, ``better``, ``worse`` or ``not told apart``; ``intervals``: how many of all ratios
        leave out 1, and ``ratios``: how many there are.
    """
    from bench.report import speed, words
    from bench.roles import ROLES
    from bench.run.config import BenchConfig
    from bench.run.measured import Measurements, Stretch

    config = BenchConfig(
        baseline="http://127.0.0.1:1",
        candidate="http://127.0.0.1:2",
        out=Path("unwritten"),
        concurrencies=tuple(LOADS),
        rounds=rounds,
        output_tokens=Lengths.fixed(OUTPUT_TOKENS),
    )
    rng, measured, machine = np.random.default_rng(seed), Measurements(), 0.0
    for round_ in range(rounds):
        for step, load in enumerate(config.loads):
            for role in ROLES if (round_ + step) % 2 == 0 else ROLES[::-1]:
                machine += rng.normal(0.0, noise.drift)
                busy = math.exp(machine + rng.normal(0.0, noise.block))
                in_flight = load.concurrency or 1
                count = max(-(-96 // rounds), LOADS[in_flight] if in_flight > 1 else 0, 3 * in_flight)
                block = simulated(servers[role], in_flight, count, rng, busy, noise)
                measured.units[role, load.name, round_] = [(load, Stretch(block))]
    ratios = speed.ratios(measured, speed.points(measured, config), config)
    told = [ratio for ratio in ratios if ratio.low is not None and ratio.high is not None]
    return {
        "headlines": {ratio.metric: words.told(ratio) for ratio in ratios if ratio.headline},
        "intervals": sum(not (ratio.low or 0.0) <= 1.0 <= (ratio.high or 0.0) for ratio in told),
        "ratios": len(told),
    }


def accuracy_claims(n: int, lost: float, won: float, seed: int, tasks: int = 4) -> str:
    """Ask two models ``n`` questions of several tasks; return the verdict over all of them."""
    from bench.report.accuracy import Pair, rows

    luck = np.random.default_rng(seed).random(n)
    before, after = np.where(luck >= 1 - won, 0.0, 1.0), np.where(luck < lost, 0.0, 1.0)
    pairs = [
        Pair(f"task {at % tasks}", "exact", f"question {at}", float(before[at]), float(after[at])) for at in range(n)
    ]
    overall, _ = rows(pairs, seed=seed, margin=0.01)
    return overall.verdict


def _share(part: int, whole: int) -> str:
    from bench.judge.stats import wilson

    found = wilson(part, whole)
    return f"{part} of {whole} ({100 * part / whole:.0f}%, 95%: {100 * found.low:.0f}-{100 * found.high:.0f}%)"


def _found(runs: Sequence[dict[str, Any]], word: str) -> dict[str, int]:
    """How many runs say this of each headline, and of any."""
    names = runs[0]["headlines"]
    counts = {name: sum(run_["headlines"].get(name) == word for run_ in runs) for name in names}
    return counts | {"any": sum(word in run_["headlines"].values() for run_ in runs)}


def run(settings: FalseClaimsSettings) -> None:
    """Simulate, and write false-claims.json and README.md; print the sentence that counts."""
    from bench.judge.verdict import power
    from toolkit.console import out

    noise, server = Noise(), Server()
    equal = {"baseline": server, "candidate": server}
    slow = {"baseline": server, "candidate": server.slower(1.05)}
    same = [speed_claims(equal, settings.rounds, 1000 + seed, noise) for seed in range(settings.runs)]
    verdicts = [accuracy_claims(settings.questions, 0.03, 0.03, 2000 + seed) for seed in range(settings.runs)]
    claims = sum(told in ("better", "worse") for each in same for told in each["headlines"].values())
    claims += verdicts.count("worse")
    headlines = sum(len(each["headlines"]) for each in same) + len(verdicts)
    slower = {
        rounds: _found([speed_claims(slow, rounds, 3000 + seed, noise) for seed in range(settings.searches)], "worse")
        for rounds in (settings.rounds, 3)
    }
    worse = [accuracy_claims(settings.questions, 0.04, 0.02, 4000 + seed) for seed in range(settings.searches)]
    found = {
        "command": f"python -m bench.studies false-claims --runs {settings.runs} --searches {settings.searches}",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "noise": asdict(noise),
        "server": asdict(server),
        "rounds": settings.rounds,
        "identical": {
            "runs": settings.runs,
            "headlines": headlines,
            "claims": claims,
            "runs with an interval that leaves out 1": sum(each["intervals"] > 0 for each in same),
            "intervals that leave out 1": sum(each["intervals"] for each in same),
            "intervals": sum(each["ratios"] for each in same),
        },
        "5% slower": {f"{rounds} rounds": counts | {"runs": settings.searches} for rounds, counts in slower.items()},
        "2 points worse": {
            "questions": settings.questions,
            "runs": settings.searches,
            "worse": worse.count("worse"),
            "power": round(power(settings.questions, 0.06, -0.02), 3),
        },
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "false-claims.json").write_text(json.dumps(found, indent=1) + "\n")
    (settings.out / "README.md").write_text(_page(found))
    out.print(
        f"{settings.runs} runs of identical servers: {claims} of {headlines} headlines claim a difference",
        highlight=False,
    )


def _page(found: dict[str, Any]) -> str:
    """The results as people read them."""
    same, worse, noise = found["identical"], found["2 points worse"], found["noise"]
    names = {
        "tpot": "time per token",
        "ttft": "time to first token",
        "steady_output_tokens_per_s": "throughput",
        "any": "any of them",
    }
    lines = [
        "# False claims",
        "",
        f"    {found['command']} --out docs/results/false-claims",
        "",
        "How often a report claims what is not there, and finds what is. Request times are drawn, not waited for: "
        "servers of known speed under 1, 4 and 16 in flight, with the defaults of `qvl bench`, on a machine whose pace "
        f"differs by {100 * noise['block']:g}% from block to block of load, walks by {100 * noise['drift']:g}% a "
        f"block, and by {100 * noise['request']:g}% from request to request (standard deviations; the rounds' ratios "
        "then "
        "differ by 4%, as those of the published reports of a 7B do at 8 in flight). All behind the times is what "
        f"`qvl bench` does. {', '.join(f'{name} {version}' for name, version in found['versions'].items())}.",
        "",
        f"**{same['runs']} runs of identical servers: {_share(same['claims'], same['headlines'])} headlines claim a "
        f"difference** (three of speed and one of accuracy a run, {found['rounds']} rounds). Of all "
        f"{same['intervals']} intervals in the tables {same['intervals that leave out 1']} leave out 1, at least one "
        f"in {same['runs with an interval that leaves out 1']} runs: that is why they are no headlines.",
        "",
        "**A candidate that is 5% slower** is called so by",
        "",
        "| headline | " + " | ".join(found["5% slower"]) + " |",
        "|---|" + "---|" * len(found["5% slower"]),
    ]
    for name, words in names.items():
        cells = [_share(counts[name], counts["runs"]) for counts in found["5% slower"].values()]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"**A candidate that is 2 points worse** (4% of answers lost, 2% won) is called `worse` in "
        f"{_share(worse['worse'], worse['runs'])} runs with {worse['questions']:,} questions; the rule's power is "
        f"{100 * worse['power']:.0f}%.",
    ]
    return "\n".join(lines) + "\n"
