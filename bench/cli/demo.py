"""`qvl demo` and `qvl gpu-bench`: the whole way as a sequence of qvl commands, each shown as it would be typed."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from bench.cli.commands import run

__all__ = ["register"]

_PANEL = "Whole way"
#: Calibration chats for the embedded model: enough that more change nothing, few enough for two cores.
_DEMO_SAMPLES = 48


def register(app: typer.Typer) -> None:
    """Add this module's verbs to ``app``."""
    app.command(rich_help_panel=_PANEL)(demo)
    app.command("gpu-bench", rich_help_panel=_PANEL)(gpu_bench)


def demo(
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and report; made anew.")] = Path("out/demo"),
) -> None:
    """Quantize the embedded model, convert, serve, ask, and measure it against its fp16 self."""
    from bench.run.boot import free_ports

    tour = _Tour()
    gemm, gemv, report = out / "gemm", out / "gemv", out / "report"
    tour.qvl("Quantize", f"quantize --model demo --out {gemm} --samples {_DEMO_SAMPLES} --force")
    tour.qvl("Convert", f"convert {gemm} --out {gemv} --to gemv --force")
    tour.qvl("Inspect", f"inspect {gemm}")
    image = Path("docs/images/shapes.png")
    if not image.is_file():  # not started from the repository
        tour.qvl("Draw images", f"demo-data --out {out / 'images'} --number 1")
        image = next((out / "images").glob("**/*counting*.png"))
    for name, port in zip((gemm, gemv), free_ports(2), strict=True):
        tour.qvl(f"Serve the {name.name.upper()} checkpoint", f"serve {name} --port {port} --detach")
        try:
            question = shlex.quote("How many shapes are in the picture?")
            tour.qvl("Ask", f"ask --url http://127.0.0.1:{port} --image {image} {question}")
        finally:
            tour.qvl("Stop", f"stop --port {port}")
    # No sweep, of which three of four requests under load would be: rounds stay eight, which is what intervals need.
    tour.qvl(
        "Measure against fp16",
        f"bench --baseline demo --candidate {gemm} --out {report} --quick --force"
        " --concurrency 1,4 --slo ttft=500ms,tpot=50ms",
    )
    tour.done(f"Look at {report / 'report.html'}")


def gpu_bench(
    out: Annotated[Path, typer.Option(help="Directory for checkpoints and reports.")] = Path("out/gpu"),
    shape: Annotated[str, typer.Option(help="Of the random weights: 2b, 7b, qwen2.5-vl-3b, ...")] = "2b",
    tokenizer: Annotated[Path | None, typer.Option(help="Directory with a Qwen2 tokenizer.json.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration chats.")] = 128,
    concurrency: Annotated[str, typer.Option(help="Requests in flight, a point each.")] = "1,8,32",
    embedded: Annotated[bool, typer.Option(help="Measure the embedded model too, whose answers can be right.")] = True,
) -> None:
    """Measure on a GPU: a real shape with random weights for speed, the embedded model for accuracy."""
    tour = _Tour()
    source, awq = out / f"{shape}-bf16", out / f"{shape}-awq"
    if not source.exists():
        given = f" --tokenizer {tokenizer}" if tokenizer else ""
        tour.qvl("Make weights", f"random-model --shape {shape} --out {source} --device cuda{given}")
    tour.qvl("Quantize", f"quantize --model {source} --out {awq} --samples {samples} --force")
    tour.qvl(
        "Measure against bf16",
        f"bench --baseline {source} --candidate {awq} --out {out / f'report-{shape}'} --tasks none"
        f" --concurrency {concurrency} --force",
    )
    if embedded:
        gemm = out / "demo-gemm"
        tour.qvl("Quantize the embedded model", f"quantize --model demo --out {gemm} --samples {samples} --force")
        tour.qvl(
            "Measure against fp16",
            f"bench --baseline demo --candidate {gemm} --out {out / 'report-demo'}"
            " --concurrency 1,8 --output-tokens 32 --image-sizes 224x224,224x168 --force",
        )
    tour.done(f"Reports are in {out}")


class _Tour:
    """Runs qvl commands one after the other and stops at the first that fails."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def qvl(self, title: str, command: str) -> None:
        """Show and run one command; its exit code, if not 0, becomes this process's."""
        from toolkit.console import err

        err.print(f"\n[bold]{title}[/bold] [dim]({time.monotonic() - self._began:.0f} s)[/dim]")
        if code := run(shlex.split(command)):
            raise typer.Exit(code)

    def done(self, message: str) -> None:
        """Say how long it took and where the results are."""
        from toolkit.console import out

        out.print(f"\nDone in {time.monotonic() - self._began:.0f} s. {message}", highlight=False)
