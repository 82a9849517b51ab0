"""What a command line of `qvl bench` asks for: presets, defaults, and what a resumed run must equal."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from bench.report.build import workload
from bench.run import presets
from bench.run.config import BenchConfig, is_url
from serve.settings.ask import AskConfig
from serve.settings.config import ServerConfig
from toolkit.errors import BenchError
from toolkit.options import Settings, settings_as_options

GIVEN = ["--baseline", "http://127.0.0.1:1", "--candidate", "http://127.0.0.1:2", "--out", "out"]


def read(*arguments: str) -> BenchConfig:
    """The settings of a command line."""
    found: list[BenchConfig] = []
    app = typer.Typer()

    @app.command()
    @settings_as_options
    def verb(config: BenchConfig) -> None:
        found.append(config)

    result = CliRunner().invoke(app, [*GIVEN, *arguments])
    if result.exception:
        raise result.exception
    return found[0]


#: What was asked for by a run that was begun before there was a `BenchConfig`: such a run goes on.
PLAIN = {
    "--answer-tokens": "64",
    "--arrivals": "poisson",
    "--baseline": "http://127.0.0.1:1",
    "--candidate": "http://127.0.0.1:2",
    "--concurrency": "1,4,16",
    "--duration": "None",
    "--image-sizes": "448x448",
    "--images": "None",
    "--images-per-request": "1",
    "--margin": "1",
    "--output-tokens": "128",
    "--per-task": "None",
    "--prompt-tokens": "16",
    "--question-concurrency": "4",
    "--ramp": "0",
    "--rate": "none",
    "--requests": "96",
    "--rounds": "8",
    "--seed": "0",
    "--sequential": "False",
    "--serve-arg": "none",
    "--slo": "none",
    "--sweep": "none",
    "--tasks": "demo",
    "--timeout": "120",
}
CASES: dict[str, dict[str, str]] = {
    "--quick": {
        "--answer-tokens": "32",
        "--concurrency": "1,2,4",
        "--image-sizes": "224x224,224x168",
        "--output-tokens": "16",
        "--per-task": "25",
        "--requests": "24",
    },
    "--rate 4,2.5 --arrivals constant --duration 30 --ramp 2.5 --slo ttft=200ms,tpot=0.03s --seed 3 --margin 0.5": {
        "--arrivals": "constant",
        "--concurrency": "none",
        "--duration": "30.0",
        "--margin": "0.5",
        "--ramp": "2.5",
        "--rate": "2.5,4",
        "--seed": "3",
        "--slo": "ttft=200ms,tpot=30ms",
    },
    (
        "--quick --sweep --preset multi-image --output-tokens 32-64 --serve-arg=--max-num-seqs=16 "
        "--serve-arg=-x --sequential --timeout 60"
    ): {
        "--answer-tokens": "32",
        "--concurrency": "none",
        "--image-sizes": "448x448,336x252,252x336",
        "--images-per-request": "2-6",
        "--output-tokens": "32-64",
        "--per-task": "25",
        "--prompt-tokens": "64",
        "--requests": "24",
        "--sequential": "True",
        "--serve-arg": "--max-num-seqs=16 -x",
        "--sweep": "3 rates up to 8 in flight",
        "--timeout": "60",
    },
    (
        "--preset ocr-document --images DIR --concurrency 8,2 --image-sizes text,56x56 "
        "--images-per-request 1-3 --prompt-tokens lognormal:64:0.6 --per-task 7 --answer-tokens 9 "
        "--question-concurrency 2 --rounds 2 --requests 10"
    ): {
        "--answer-tokens": "9",
        "--concurrency": "2,8",
        "--image-sizes": "text,56x56",
        "--images": "DIR",
        "--images-per-request": "1-3",
        "--output-tokens": "lognormal:512:0.4",
        "--per-task": "7",
        "--prompt-tokens": "lognormal:64:0.6",
        "--question-concurrency": "2",
        "--requests": "10",
        "--rounds": "2",
        "--tasks": "none",
    },
}


@pytest.mark.parametrize("line", ["", *CASES])
def test_a_run_that_was_begun_before_goes_on(line: str) -> None:
    assert read(*line.split()).asked() == PLAIN | CASES.get(line, {})


def test_what_does_not_decide_the_figures_may_change() -> None:
    changed = read("--api-key", "k", "--baseline-key", "b", "--port", "9000", "--resume", "--force")
    assert changed.asked() == PLAIN
    assert "k'" not in repr(changed)


def test_each_side_may_have_a_key_and_a_model_of_its_own() -> None:
    found = read("--api-key", "k", "--candidate-key", "c", "--baseline-model", "a", "--candidate-model", "b")
    assert (found.key("baseline"), found.key("candidate")) == ("k", "c")
    assert found.models == {"baseline": "a", "candidate": "b"}
    assert found.asked() == PLAIN | {"--baseline-model": "a", "--candidate-model": "b"}
    with pytest.raises(BenchError, match="--baseline-model: demo is no URL"):
        read("--baseline", "demo", "--baseline-model", "a")


@pytest.mark.parametrize("url", ["HTTP://host:1", "Https://host", " http://host/v1/chat/completions"])
def test_urls_are_known_by_their_scheme_in_any_case(url: str) -> None:
    assert is_url(url) and not is_url("httpx") and not is_url("models/http:")


@pytest.mark.parametrize("name", ["full", "quick", *presets.USES])
def test_a_preset_sets_fields_alone(name: str) -> None:
    file = Path(presets.__file__).parent / f"{name}.toml"
    assert set(tomllib.loads(file.read_text())) - {"use"} <= BenchConfig.model_fields.keys()


def test_what_is_given_is_before_the_use_and_the_use_before_quick() -> None:
    found = read("--quick", "--preset", "chat", "--prompt-tokens", "9")
    assert (str(found.prompt_tokens), str(found.output_tokens)) == ("9", "lognormal:128:0.5")
    assert (found.requests, found.image_sizes) == (24, ((448, 448),))
    assert read("--quick").image_sizes == ((224, 224), (224, 168))


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(BenchError, match=r"--preset 'x': choose one of chat: a question .*; multi-image: 2 to 6"):
        read("--preset", "x")


@pytest.mark.parametrize(
    ("arguments", "concurrencies", "tasks"),
    [
        ([], (1, 4, 16), "demo"),
        (["--sweep"], (), "demo"),
        (["--rate", "2", "--concurrency", "3"], (3,), "demo"),
        (["--images", "mine"], (1, 4, 16), "none"),
        (["--images", "mine", "--tasks", "demo"], (1, 4, 16), "demo"),
    ],
)
def test_defaults_that_depend_on_what_is_given(
    arguments: list[str], concurrencies: tuple[int, ...], tasks: str
) -> None:
    found = read(*arguments)
    assert (found.concurrencies, found.tasks) == (concurrencies, tasks)


def test_a_report_says_what_was_asked() -> None:
    found: dict[str, Any] = workload(read("--quick", "--sweep", "--slo", "ttft=200ms", "--duration", "3")).model_dump()
    assert (found["concurrencies"], found["sweep"], found["sweep_concurrency"]) == ([], 3, 8)
    assert (found["slos"], found["duration_s"], found["arrivals"]) == (["ttft=200ms"], 3.0, "poisson")
    assert (found["image_sizes"], found["output_tokens"]) == (["224x224", "224x168"], "16")


@pytest.mark.parametrize("settings", [BenchConfig, ServerConfig, AskConfig])
def test_a_secret_has_a_better_place_than_the_command_line(settings: type[Settings]) -> None:
    """What is not shown in a repr is not to be seen in ps either."""
    secrets = {name: field for name, field in settings.model_fields.items() if not field.repr}
    assert secrets
    for name, field in secrets.items():
        options = [each for each in field.metadata if hasattr(each, "instead")]
        assert options and all(option.envvar and option.envvar in option.instead for option in options), name
