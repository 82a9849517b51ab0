"""`qvl`: one thin function a verb. Heavy imports live inside the functions, so that `qvl --help` starts in a blink."""

from __future__ import annotations

from typing import Annotated

import typer
from typer.core import TyperGroup

from bench.cli.bench import register as register_bench
from bench.cli.compare import register as register_compare
from bench.cli.demo import register as register_tour
from bench.cli.judge import register as register_judge
from bench.cli.verify import register as register_verify
from bench.tune.cli import register as register_tune
from serve.cli import register as register_serve
from serve.plan.cli import register as register_plan
from toolkit.help import Verbs
from toolkit.verbs import register as register_toolkit

app = Verbs(
    name="qvl",
    help="Qwen2-VL and its kin from fp16 weights to a 4-bit AWQ server, with the report that says what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    cls=TyperGroup,
)


def _say_version(asked: bool) -> None:
    if asked:
        from toolkit.version import __version__

        typer.echo(f"qvl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    pass


register_toolkit(app)
register_serve(app)
register_plan(app)
register_bench(app)
register_compare(app)
register_judge(app)
register_verify(app)
register_tour(app)
register_tune(app)


def main() -> None:
    """Run `qvl`: a user's mistake prints one message and exits with 2, never a traceback (``QVL_DEBUG=1`` shows it)."""
    from toolkit.console import run

    run(app)


if __name__ == "__main__":
    main()
