"""``python -m bench.studies NAME``: one command a study. A study's own imports wait until it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.studies.quantizer.cli import register as register_quantizer
from bench.studies.settings import (
    AgreementSettings,
    BesideSettings,
    BootsSettings,
    CapacitySettings,
    CardSettings,
    ChoicesSettings,
    ColdStartSettings,
    DraftSettings,
    FalseClaimsSettings,
    FaultSettings,
    FormatsSettings,
    GuardCostSettings,
    KernelSettings,
    QualitySettings,
    RealLmSettings,
    SeededFaultsSettings,
    StepSettings,
    TimedServerSettings,
    TuningSettings,
)
from toolkit.console import command_group
from toolkit.options import settings_as_options

__all__ = ["app"]

app = command_group("python -m bench.studies", "The measurements behind docs/results, each of which can be made again.")


@app.command()
@settings_as_options
def agreement(settings: AgreementSettings) -> None:
    """Do `vllm bench serve` and this benchmark measure the same? Both ask one server, in turns."""
    from bench.studies.agreement import run

    run(settings)


@app.command()
@settings_as_options
def boots(model: Annotated[str, typer.Argument(help="Directory, hub id or demo.")], settings: BootsSettings) -> None:
    """What does a flag or a variable bring? Servers started in several ways, asked in turns."""
    from bench.studies.boots import run

    run(model, settings)


@app.command("capacity-check")
@settings_as_options
def capacity_check(
    models: Annotated[list[str], typer.Argument(help="Directories, hub ids or demo.")], settings: CapacitySettings
) -> None:
    """Hold `qvl plan` against real boots: what vLLM reports, what was estimated, and the difference."""
    from bench.studies.capacity_check import run

    run(models, settings)


@app.command()
def chart(
    results: Annotated[Path, typer.Option(help="Directory of the reports.")] = Path("docs/results"),
    out: Annotated[Path, typer.Option(help="SVG to write.")] = Path("docs/images/speed.svg"),
) -> None:
    """Draw README's chart, time per token and memory in 16 bits and four, from reports that are there."""
    from bench.studies.chart import REPORTS, draw

    draw([(name, results / report) for name, report in REPORTS], out)


@app.command()
@settings_as_options
def choices(settings: ChoicesSettings) -> None:
    """What to calibrate on, the vision tower, layers in 16 bits: the embedded model's divergence by each choice."""
    from bench.studies.choices import run

    run(settings)


@app.command("cold-start")
@settings_as_options
def cold_start(settings: ColdStartSettings) -> None:
    """Time from the command to the first answer, by steps, first and second start."""
    from bench.studies.cold_start import run

    run(settings)


@app.command()
@settings_as_options
def drafts(model: Annotated[str, typer.Argument(help="Directory, hub id or demo.")], settings: DraftSettings) -> None:
    """What does guessing tokens ahead bring? The same questions without a draft, with n-grams, with an EAGLE-3 head."""
    from bench.studies.drafts import run

    run(model, settings)


@app.command("false-claims")
@settings_as_options
def false_claims(settings: FalseClaimsSettings) -> None:
    """How often does a report claim what is not there, and find what is? Many runs of servers that are known."""
    from bench.studies.false_claims import run

    run(settings)


@app.command("faulty-checkpoints")
@settings_as_options
def faulty_checkpoints(
    fault: Annotated[str, typer.Argument(help="scales, unfolded or rounded.")],
    awq: Annotated[Path, typer.Argument(help="AWQ checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Directory to write.")],
    settings: FaultSettings,
) -> None:
    """Write a checkpoint with a known fault, as a broken quantizer would leave it."""
    from bench.studies.faulty_checkpoints import run

    run(fault, awq, out, settings)


@app.command("formats")
@settings_as_options
def formats(settings: FormatsSettings) -> None:
    """Does one set of 4-bit weights answer alike as GEMM and as compressed-tensors, by each kernel?"""
    from bench.studies.formats import run

    run(settings)


@app.command("gpu-figures")
@settings_as_options
def gpu_figures(
    step: Annotated[str, typer.Argument(help="prepare, up, measure, down, profile, or all: the first four.")],
    settings: CardSettings,
) -> None:
    """Measure one card: 16 bits against 4, and vLLM's kernel against another, all servers up at once."""
    from bench.studies.gpu_figures import run

    run(step, settings)


@app.command("guard-cost")
@settings_as_options
def guard_cost(settings: GuardCostSettings) -> None:
    """Measure what the guard takes of throughput and latency: the same server with and without it, in turns."""
    from bench.studies.guard_cost import run

    run(settings)


@app.command("guard-cost-engine", hidden=True)
def guard_cost_engine(
    engine: Annotated[str, typer.Argument(help="Which of those that are made up.")],
    port: Annotated[int, typer.Option()],
    guarded: Annotated[bool, typer.Option("--guarded")] = False,
) -> None:
    """Be the server of an engine that guard-cost makes up."""
    from bench.studies.guard_cost import serve

    serve(engine, guarded, port)


@app.command()
@settings_as_options
def kernels(settings: KernelSettings) -> None:
    """Tune our kernel for few rows on this card (an H100): the plans that serve/kernels ships."""
    from bench.studies.kernels import run

    run(settings)


@app.command("real-lm")
@settings_as_options
def real_lm(step: Annotated[str, typer.Argument(help="texts, measure or table.")], settings: RealLmSettings) -> None:
    """Ways of quantizing on real weights: divergence from 16 bits, perplexity, minutes. Can be stopped and goes on."""
    from bench.studies.real_lm.study import run

    run(step, settings)


@app.command("kernels-beside")
@settings_as_options
def kernels_beside(settings: BesideSettings) -> None:
    """Kernels for 4-bit weights beside each other and bf16, product by product, on one card."""
    from bench.studies.kernels_beside import run

    run(settings)


@app.command("seeded-faults")
@settings_as_options
def seeded_faults(settings: SeededFaultsSettings) -> None:
    """Are faults that are known to be there found? The embedded model, quantized well and with faults."""
    from bench.studies.seeded_faults import run

    run(settings)


@app.command()
@settings_as_options
def quality(
    candidates: Annotated[list[Path], typer.Argument(help="Directories: AWQ checkpoints, or others in 16 bits.")],
    settings: QualitySettings,
) -> None:
    """Which quantization is nearest to its source on your own images? KL on a manifest's answers, without a server."""
    from bench.studies.quality import run

    run(candidates, settings)


@app.command("step-profile")
@settings_as_options
def step_profile(
    model: Annotated[str, typer.Argument(help="Directory, hub id or demo.")], settings: StepSettings
) -> None:
    """Show where the time of a decode step goes under vLLM: kernels, gaps, the host's launches."""
    from bench.studies.step_profile import run

    run(model, settings)


@app.command("support")
def support(
    out: Annotated[Path | None, typer.Option(help="File to write; default docs/support.md.")] = None,
) -> None:
    """Write what runs where: family x format x engine x card, from tests and results."""
    from bench.studies.support import run

    run(out)


@app.command("timed-server")
@settings_as_options
def timed_server(settings: TimedServerSettings) -> None:
    """Serve by the clock: every token comes when it is due, so what a client measures is known beforehand."""
    from bench.studies.timed_server import run

    run(settings)


@app.command()
@settings_as_options
def tuning(settings: TuningSettings) -> None:
    """Measure the figures of docs/tuning.md and docs/multi-gpu.md, in steps that can be killed and called again."""
    from bench.studies.tuning import run

    run(settings)


register_quantizer(app)
