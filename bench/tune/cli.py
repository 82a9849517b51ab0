"""`qvl tune`: what is fastest here, kept as a profile that `qvl serve` uses.

Heavy imports live inside the functions.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bench.tune.config import TuneConfig
from toolkit.options import settings_as_options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bench.tune.journal import Journal
    from serve.settings.backend import Backend
    from serve.settings.config import ServerConfig
    from serve.settings.engine import EngineSettings
    from serve.settings.profiles import Key, Profile

__all__ = ["register"]

#: Exit status when the time was up before all was measured.
_TIME_UP = 3


def register(app: typer.Typer) -> None:
    """Add this module's verb to ``app``."""
    app.command(rich_help_panel="Server")(tune)


@settings_as_options
def tune(model: Annotated[str, typer.Argument(help="Directory, hub id or demo.")], config: TuneConfig) -> None:
    """Measure vLLM's settings on this machine and keep the fastest at each load as a profile for `qvl serve`.

    A candidate that does not start is recorded and skipped. Killed, or out of time, it goes on when called again.
    """
    from bench.machine.environment import command_line
    from bench.run.boot import free_ports, server_of
    from bench.run.signals import sigterm_like_ctrl_c
    from bench.tune.journal import FP16
    from bench.tune.measure import tune as run
    from bench.tune.profile import profile_of
    from bench.tune.show import progress
    from serve.plan.candidates import refuse_busy_gpu
    from serve.settings.backend import choose, require_vllm
    from serve.settings.config import ServerConfig
    from serve.settings.engine import EngineSettings
    from serve.settings.parallel import Parallel
    from serve.settings.profiles import key_for
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.sources.directory import resolve

    where = choose(config.backend)
    require_vllm(where)
    if where == "gpu" and not config.shared:
        refuse_busy_gpu()
    checkpoint = Checkpoint.open(resolve(model))
    parallel = Parallel(tp=config.tp)
    parallel.check(checkpoint, where)
    _check_questions(config)
    key = key_for(checkpoint, where, config.tp)
    tried = _tried(config, where, key, quantized=checkpoint.quantization is not None)
    journal = _journal(config, key, str(checkpoint.path.resolve()))
    sources = dict.fromkeys(tried, model) | ({FP16: config.fp16} if config.fp16 else {})
    settings = {name: each.as_dict() for name, each in tried.items()} | ({FP16: {}} if config.fp16 else {})

    def options(name: str) -> ServerConfig:
        return ServerConfig(
            port=free_ports(1)[0],
            backend=where,
            max_model_len=config.max_model_len,
            timeout=config.boot_timeout_s,
            parallel=parallel,
            settings=tried.get(name, EngineSettings()),
        )

    with sigterm_like_ctrl_c(), progress() as (on_step, on_phase):
        complete = run(
            settings,
            config,
            lambda name: server_of(sources[name], options(name), on_phase),
            journal,
            seconds=60 * config.minutes,
            progress=on_step,
        )
    profile = profile_of(key, config, journal, settings, command_line(sys.argv[1:]))
    _conclude(config, journal, profile, complete)


def _check_questions(config: TuneConfig) -> None:
    """Read the file once: a line that is no question is found before any boot."""
    if config.questions is not None:
        from bench.questions.tasks import load_questions

        load_questions(config.questions)


def _tried(config: TuneConfig, where: Backend, key: Key, *, quantized: bool) -> Mapping[str, EngineSettings]:
    """Return the candidates by name.

    Raises:
        BenchError: there is none of a name that was given.
    """
    from serve.plan.candidates import candidates
    from toolkit.errors import BenchError

    tried = candidates(where, key.card, quantized, text=config.questions is not None, lossy=config.lossy)
    if config.only is None:
        return tried
    names = config.only.split(",")
    if unknown := [name for name in names if name not in tried]:
        raise BenchError(f"--only {unknown[0]}: no such candidate here. There are {', '.join(tried)}.")
    return {name: tried[name] for name in names}


def _journal(config: TuneConfig, key: Key, model: str) -> Journal:
    from bench.tune.journal import Journal
    from toolkit.paths import cache_dir

    about = {"key": asdict(key), "plan": config.load(), "model": model, "fp16": config.fp16}
    return Journal(cache_dir("tune", Journal.name(about)), about, fresh=config.restart)


def _conclude(config: TuneConfig, journal: Journal, profile: Profile | None, complete: bool) -> None:
    """Keep the profile and show what was found.

    Raises:
        BenchError: nothing was measured.
    """
    from bench.tune.show import show
    from serve.settings.profiles import save
    from toolkit.console import note
    from toolkit.errors import BenchError

    if profile is None:
        reasons = "\n".join(f"{t.name}: {t.failed}" for t in journal.trials.values() if t.failed)
        if not reasons and config.fail_if_left:
            note("the time was up before anything was measured: give more --minutes")
            raise typer.Exit(_TIME_UP)
        raise BenchError(f"nothing was measured: {reasons or 'the time was up before the first load'}")
    path = save(profile, config.out)
    if config.as_json:
        trials = [asdict(trial) for trial in journal.trials.values()]
        found: dict[str, Any] = {"profile": json.loads(profile.dumps()), "trials": trials, "complete": complete}
        typer.echo(json.dumps(found, indent=1))
    else:
        show(journal, config, profile)
    note(f"profile: {path}; `qvl serve` finds it" if config.out is None else f"profile: {path}")
    if not complete:
        note("the time is up: the same command goes on with what is left")
        if config.fail_if_left:
            raise typer.Exit(_TIME_UP)
