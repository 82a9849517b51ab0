"""How long `qvl serve` takes from the command to its first answer, and where the time goes.

    python -m bench.cold_start MODEL --out DIR [--runs 3] [-- FLAGS OF qvl serve]

Each run starts twice: with vLLM's and the compiler's caches empty, and again with what the first start left in them.
The operating system's page cache is left alone, so weights come from memory after the very first start. Seconds are
read off the lines that `qvl serve` prints, as they arrive.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.errors import BenchError

__all__ = ["Start", "draw", "markdown", "phases", "summarise"]

STARTS = ("empty caches", "kept caches")
#: The name of what comes before the first line that names a phase: Python, and what qvl checks before it starts vLLM.
BEFORE = "qvl's own checks"
_PHASE = re.compile(r"^starting .+ on port \d+: (?P<phase>.+) \(\d+ s\)$")
_READY = re.compile(r"^ready: \S+ at (?P<url>\S+)/v1 ")


@dataclass(frozen=True)
class Start:
    """One start: seconds from the command to its first answer, and of each phase, in order; they add up to it."""

    caches: str
    seconds: float
    phases: dict[str, float]


def phases(lines: list[tuple[float, str]]) -> dict[str, float]:
    """Return the seconds of each phase in order.

    Args:
        lines: what `qvl serve` printed until it was ready, each line with the seconds since the command.

    Raises:
        BenchError: it never became ready.
    """
    found: dict[str, float] = {}
    name, since = BEFORE, 0.0
    for seconds, line in lines:
        phase = _PHASE.match(line)
        if phase or _READY.match(line):
            found[name] = found.get(name, 0.0) + seconds - since
            since = seconds
        if phase:
            name = phase["phase"]
        elif _READY.match(line):
            return found
    raise BenchError("the server did not become ready; it printed:\n" + "\n".join(line for _, line in lines[-20:]))


def _start(model: str, flags: list[str], port: int, caches: Path, name: str) -> Start:
    environment = os.environ | {
        "VLLM_CACHE_ROOT": str(caches / "vllm"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    command = [sys.executable, "-m", "toolkit.cli", "serve", model, "--port", str(port), *flags]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        lines = []
        for line in process.stdout or ():
            lines.append((time.monotonic() - began, line.rstrip()))
            if _READY.match(line):
                break
        found = phases(lines)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=120)
    return Start(caches=name, seconds=sum(found.values()), phases=found)


def summarise(starts: list[Start]) -> dict[str, Any]:
    """Return medians over runs: seconds and phases by kind of start, and second / first paired by run."""
    by_kind = {kind: [start for start in starts if start.caches == kind] for kind in STARTS}
    first, second = (by_kind[kind] for kind in STARTS)
    return {
        "median_seconds": {kind: statistics.median(s.seconds for s in found) for kind, found in by_kind.items()},
        "median_phases": {
            kind: {
                phase: statistics.median(s.phases.get(phase, 0.0) for s in found)
                for phase in dict.fromkeys(phase for s in found for phase in s.phases)
            }
            for kind, found in by_kind.items()
        },
        "second_over_first": statistics.median(b.seconds / a.seconds for a, b in zip(first, second, strict=True)),
    }


def markdown(result: dict[str, Any]) -> str:
    """Return a table of phases by kind of start, and what it was measured on."""
    medians, found = result["summary"]["median_seconds"], result["summary"]["median_phases"]
    names = dict.fromkeys(phase for kind in STARTS for phase in found[kind])
    made_with = (f"{name} {version}" for name, version in result["versions"].items())

    def row(name: str, values: Iterable[str]) -> str:
        return f"| {name} | {' | '.join(values)} |"

    return f"""# Cold start: `{result["command"]}`

Seconds, medians of {result["runs"]} runs; ready means that a question about a picture was answered.

{row("", STARTS)}
|---|---|---|
{chr(10).join(row(name, (f"{found[kind].get(name, 0.0):.1f}" for kind in STARTS)) for name in names)}
{row("**from the command to the first answer**", (f"**{medians[kind]:.1f}**" for kind in STARTS))}

Second start / first: {result["summary"]["second_over_first"]:.0%}.

![Phases of a start](cold-start.png)

{"; ".join([result["cpu"], *result["gpus"], *made_with])}
"""


def draw(summary: dict[str, Any], file: Path) -> None:
    """Draw the phases as stacked bars, one for each kind of start."""
    from matplotlib.figure import Figure

    colours = (
        "#c9d1d9",
        "#2f6fb3",
        "#e08a1e",
        "#3f9c6b",
        "#8a5fbf",
        "#c2474b",
        "#37a3b5",
        "#b58900",
        "#7d8590",
        "#22272e",
    )
    found = summary["median_phases"]
    names = list(dict.fromkeys(phase for kind in STARTS for phase in found[kind]))
    figure = Figure(figsize=(8, 3.2), layout="constrained", facecolor="white")
    axis = figure.add_subplot()
    left = [0.0] * len(STARTS)
    for i, name in enumerate(names):
        widths = [found[kind].get(name, 0.0) for kind in STARTS]
        axis.barh(STARTS, widths, left=left, color=colours[i % len(colours)], label=name, height=0.55)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, kind in enumerate(STARTS):
        axis.annotate(
            f"{summary['median_seconds'][kind]:.1f} s", (left[y], y), (5, 0), textcoords="offset points", va="center"
        )
    axis.invert_yaxis()
    axis.set_xlim(right=max(left) * 1.12)
    axis.set_xlabel("seconds from the command to the first answer")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, dpi=144, metadata={"Software": None})


def main(
    model: Annotated[str, typer.Argument(help="A directory, a hub name, or demo.")],
    flags: Annotated[list[str] | None, typer.Argument(metavar="[-- FLAGS...]", help="Flags of `qvl serve`.")] = None,
    out: Annotated[Path, typer.Option(help="Directory for cold-start.json, README.md and cold-start.png.")] = Path(),
    runs: Annotated[int, typer.Option(min=1, help="Runs of two starts each.")] = 3,
) -> None:
    """Measure `qvl serve MODEL FLAGS` from the command to the first answer, twice a run."""
    from bench.boot import free_ports
    from bench.environment import cpu_name, gpu_names, versions
    from toolkit.console import note

    starts = []
    for run in range(runs):
        with tempfile.TemporaryDirectory(prefix="qvl-cold-start-") as caches:
            for kind in STARTS:
                starts.append(_start(model, flags or [], free_ports(1)[0], Path(caches), kind))
                note(f"run {run + 1} of {runs}, {kind}: {starts[-1].seconds:.1f} s")
    result: dict[str, Any] = {
        "command": " ".join(["qvl serve", Path(model).name, *(flags or [])]),
        "runs": runs,
        "summary": summarise(starts),
        "starts": [asdict(start) for start in starts],
        "cpu": cpu_name(),
        "gpus": gpu_names(),
        "versions": versions(),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "cold-start.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "README.md").write_text(markdown(result))
    draw(result["summary"], out / "cold-start.png")
    note(f"{out / 'README.md'}")


if __name__ == "__main__":
    typer.run(main)
