"""``python -m toolkit.demo NAME``: what is made of the embedded model beside its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.console import command_group
from toolkit.paths import demo_checkpoint

__all__ = ["app"]

app = command_group("python -m toolkit.demo", "What is made of the embedded model beside its weights.")

_Model = Annotated[Path, typer.Option(help="Directory that qvl demo-model wrote.", show_default="the embedded model")]
_EMBEDDED = demo_checkpoint()


@app.command()
def gallery(out: Annotated[Path, typer.Option(help="Directory to write.")] = Path("docs/images")) -> None:
    """Draw the README's images."""
    from toolkit.demo.gallery import draw

    draw(out)


@app.command()
def evaluate(
    model: _Model = _EMBEDDED,
    per_task: Annotated[int, typer.Option(help="Questions a task.")] = 200,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
) -> None:
    """Measure a demo checkpoint; write its accuracy.json and README.md."""
    from toolkit.demo.evaluate import record_accuracy

    facts = record_accuracy(model, per_task, device)
    print(facts["accuracy"], f"{facts['seconds']} s")


@app.command()
def fidelity(
    checkpoints: Annotated[list[str] | None, typer.Argument(help="AWQ checkpoints of the embedded model.")] = None,
    per_task: Annotated[int, typer.Option(help="Held-out questions of each of the eight tasks.")] = 40,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; cuda where there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the held-out questions.")] = 20001,
    out: Annotated[Path | None, typer.Option("--json", help="Write all of it to this file.")] = None,
) -> None:
    """Print the divergence of plain rounding and of each checkpoint from fp16, and of each over the first."""
    from toolkit.demo.fidelity import compare

    compare(checkpoints or [], per_task, device, seed, out)


@app.command("model-card")
def model_card(model: _Model = _EMBEDDED) -> None:
    """Write a demo checkpoint's model card from its records."""
    from toolkit.demo.model_card import write_card

    print(write_card(model))
