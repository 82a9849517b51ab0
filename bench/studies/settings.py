"""What each study is asked for: one model of settings a study, from which its command line is made too."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

from toolkit.options import Option, Settings

__all__ = [
    "AgreementSettings",
    "BesideSettings",
    "CapacitySettings",
    "CardSettings",
    "ColdStartSettings",
    "FalseClaimsSettings",
    "FaultSettings",
    "FormatsSettings",
    "GuardCostSettings",
    "KernelSettings",
    "RealLmSettings",
    "SeededFaultsSettings",
    "StepSettings",
    "TimedServerSettings",
    "TuningSettings",
]


class AgreementSettings(Settings):
    """Of `bench.studies.agreement`."""

    url: Annotated[str, Option("Of a vLLM server that runs.")]
    tokenizer: Annotated[str, Option("Directory or hub id, which vllm bench serve loads.")]
    concurrency: Annotated[str, Option("Requests in flight, a load each.")] = "1,8"
    requests: Annotated[int, Option("Of each round; 3 for each in flight at least.")] = 64
    rounds: Annotated[int, Option("Of each tool.")] = 3
    image_sizes: Annotated[str, Option("WIDTHxHEIGHT,... or text: a load each.")] = "text,448x448"
    prompt_words: Annotated[int, Option("Of each prompt.")] = 64
    output_tokens: Annotated[int, Option("Of each answer.")] = 128
    api_key: Annotated[
        str | None, Option("Of the server.", envvar="QVL_API_KEY", instead="the environment variable QVL_API_KEY")
    ] = None
    limit_s: Annotated[
        float | None, Option("Seconds that all of it may take; rounds that don't fit are left out.", name="--limit")
    ] = 170.0
    out: Annotated[Path | None, Option("JSON file to write, after each round.")] = None


class BesideSettings(Settings):
    """Of `bench.studies.kernels_beside`."""

    models: Annotated[str, Option("Of those in bench/studies/kernels.py.")] = "7b,2b"
    kernels: Annotated[str, Option("Beside bf16: of qvl, humming, marlin, machete, triton.")] = (
        "qvl,humming,marlin,machete"
    )
    products: Annotated[Literal["layer", "head"], Option("A decoder layer's, or the output head's.")] = "layer"
    rows: Annotated[str, Option("Of the inputs.")] = "1,2,4,8,16,32,64,128"
    seconds: Annotated[float, Option("Begin nothing after so long.")] = 3600.0
    out: Annotated[Path, Option("Directory of results.json and README.md.")] = Path("docs/results/kernels")


class BootsSettings(Settings):
    """Of `bench.studies.boots`."""

    out: Annotated[Path, Option("Directory of results.json, README.md and logs.")]
    way: Annotated[tuple[str, ...], Option("NAME=[VARIABLE=VALUE ...] [OPTION ...] [-- FLAG ...]; repeatable.")] = ()
    options: Annotated[str, Option("Options of qvl serve for all.")] = "--max-model-len 4096"
    flags: Annotated[str, Option("Flags of vLLM for all.")] = ""
    concurrency: Annotated[str, Option("Answers under way.")] = "1,8"
    requests: Annotated[int, Option("Of each that keeps an answer under way, a round.", least=1)] = 6
    rounds: Annotated[int, Option("Beside one that warms up.", least=1)] = 3
    output_tokens: Annotated[int, Option("Of each answer.", least=2)] = 128
    prompt_tokens: Annotated[int, Option("Words of each prompt.")] = 64
    image_sizes: Annotated[str, Option("Images, WIDTHxHEIGHT or text.")] = "text"
    stacks: Annotated[float, Option("Sample the first server's processes with py-spy for so many seconds.")] = 0.0
    together: Annotated[bool, Option("Boot all at once, the first too.")] = False
    port: Annotated[int, Option("Of the first server.")] = 18100
    seconds: Annotated[float, Option("Begin nothing after so long.")] = 3600.0


class CapacitySettings(Settings):
    """Of `bench.studies.capacity_check`."""

    out: Annotated[Path, Option("JSON file to write; what it has is not booted again.")]
    cards: Annotated[str, Option("Sizes to simulate, in GiB.")] = "16,24"
    context: Annotated[int, Option("Longest sequence in tokens.")] = 4096


class CardSettings(Settings):
    """Of `bench.studies.gpu_figures`."""

    shapes: Annotated[str, Option("Of 7b, 2b, qwen2.5-vl-3b, qwen3-vl-4b, tiny, the most important first.")] = "7b,2b"
    work: Annotated[Path, Option("Directory of the checkpoints.")] = Path("out/card")
    out: Annotated[Path, Option("Directory of the reports.")] = Path("out/card/results")
    tokenizer: Annotated[Path | None, Option("Directory with a Qwen2 tokenizer.json.")] = None
    samples: Annotated[int, Option("Calibration chats: speed does not depend on them.")] = 16
    profiles: Annotated[Path | None, Option("Directory of profiles (where `qvl serve` looks for yours).")] = None
    port: Annotated[int, Option("Of the first server.")] = 18000
    systems: Annotated[
        str | None, Option("Of those of the shapes, with commas: bf16, awq-qvl, awq (all), awq-qvl-head.")
    ] = None
    concurrency: Annotated[str | None, Option("Requests in flight, with commas (1,8,32,128).")] = None
    rates: Annotated[bool, Option("Open loops too.")] = True
    seconds: Annotated[float | None, Option("Of a point in each round (the shapes' own); three waves at least.")] = None
    minutes: Annotated[float, Option("Begin no report after so long.")] = 1e6


class FormatsSettings(Settings):
    """Of `bench.studies.formats`."""

    out: Annotated[Path, Option("Directory for report.json.")]
    model: Annotated[Path | None, Option("A GEMM checkpoint; default the embedded model, quantized.")] = None
    formats: Annotated[str, Option("To compare with gemm, with commas: compressed-tensors, gemv.")] = (
        "compressed-tensors"
    )
    kernels: Annotated[str, Option("On a GPU: by which, with commas.")] = "qvl,marlin,machete,humming"
    at_once: Annotated[int, Option("On a GPU: servers beside each other.", least=1)] = 8
    images: Annotated[Path | None, Option("JSONL manifest or directory of images; default drawn ones.")] = None
    samples: Annotated[int, Option("Chats.", least=1)] = 16
    tokens: Annotated[int, Option("Of each answer, at most.", least=1)] = 16


class ColdStartSettings(Settings):
    """Of `bench.studies.cold_start`."""

    out: Annotated[Path, Option("Directory for cold-start.json and table.md.")]
    model: Annotated[str, Option("Directory, hub id or demo.")] = "demo"
    repeat: Annotated[int, Option("First and second starts of each mode.")] = 3
    modes: Annotated[str, Option("Which to measure, with commas.")] = "not compiled,compiled"


class DraftSettings(Settings):
    """Of `bench.studies.drafts`."""

    out: Annotated[Path, Option("Directory for drafts.json and a random head.")]
    head: Annotated[Path | None, Option("A trained EAGLE-3 head's directory (random weights).")] = None
    image: Annotated[str, Option("That half of the questions are about.")] = "docs/images/shapes.png"
    questions: Annotated[int, Option("Of each server.", least=1)] = 12
    output_tokens: Annotated[int, Option("Of each answer.", least=1)] = 64


class FalseClaimsSettings(Settings):
    """Of `bench.studies.false_claims`."""

    out: Annotated[Path, Option("Directory to write README.md and false-claims.json to.")]
    runs: Annotated[int, Option("Of identical servers.", least=1)] = 24
    searches: Annotated[int, Option("Runs for each difference that is there.", least=1)] = 100
    rounds: Annotated[int, Option("Of each run.", least=2)] = 8
    questions: Annotated[int, Option("Of each run.", least=1)] = 2000


class FaultSettings(Settings):
    """Of `bench.studies.faulty_checkpoints`."""

    source: Annotated[Path | None, Option("The 16-bit checkpoint it was made of (unfolded, rounded).")] = None
    layer: Annotated[
        int | None, Option("Decoder layer (scales: 0 unless given; unfolded: the most scaled unless given).")
    ] = None
    by: Annotated[float, Option("How far scales are off, relative.")] = 0.05
    seed: Annotated[int, Option("Of the signs.")] = 0


class GuardCostSettings(Settings):
    """Of `bench.studies.guard_cost`."""

    rounds: Annotated[int, Option("Pairs of rounds.")] = 20
    requests: Annotated[int, Option("Requests in a round.")] = 600
    real: Annotated[bool, Option("vLLM with the embedded model too.")] = False
    real_requests: Annotated[int, Option("Requests in a round of vLLM.")] = 64
    real_rounds: Annotated[int, Option("Pairs of rounds of vLLM.")] = 8
    out: Annotated[Path | None, Option("Directory for report.json and README.md.")] = None


class ChoicesSettings(Settings):
    """Of `bench.studies.choices`."""

    out: Annotated[Path, Option("Directory of choices.json and choices.md.")] = Path("out/choices")
    only: Annotated[str | None, Option("Names of choices to try, with commas; results of others are kept.")] = None
    seeds: Annotated[str, Option("Of the calibration chats, with commas.")] = "10001,10002"
    held_out: Annotated[str, Option("Seeds of the held-out questions, with commas.")] = "20001,20002"
    per_task: Annotated[int, Option("Held-out questions of each task and seed.")] = 200
    device: Annotated[str, Option("cpu or cuda.")] = "cpu"


class QualitySettings(Settings):
    """Of `bench.studies.quality`."""

    source: Annotated[str, Option("What the candidates were made of: directory, hub id or demo.")]
    data: Annotated[str, Option("JSONL manifest of chats with images, or 'demo'; not the one they were calibrated on.")]
    out: Annotated[Path | None, Option("JSON file to write.")] = None
    samples: Annotated[int, Option("Chats to read.")] = 256
    seed: Annotated[int, Option("Of the draw of chats, and of the intervals.")] = 1
    device: Annotated[str, Option("auto, cpu or cuda.")] = "auto"
    max_tokens: Annotated[int, Option("Longer chats are left out.")] = 4096
    max_pixels: Annotated[int | None, Option("Bound on the pixels of an image; 0 is the processor's own.")] = (
        1280 * 28 * 28
    )


class RealLmSettings(Settings):
    """Of `bench.studies.real_lm`."""

    model: Annotated[Path | None, Option("Directory of a 16-bit Qwen2-VL.")] = None
    out: Annotated[Path, Option("Directory of texts and results.")] = Path("out/real-lm")
    ways: Annotated[
        str,
        Option("Ways of quantizing: rtn, autoawq, nearest, fast, best; +g64, +n512, +noclip, +nodistill; NAME=DIR."),
    ] = "rtn,autoawq,fast,best,best+noclip,fast+noclip,best+g64,fast+g64"
    seeds: Annotated[int, Option("Calibration seeds, from 0.")] = 2
    draws: Annotated[int, Option("Draws of held-out texts.")] = 2
    sequences: Annotated[int, Option("Of each draw.")] = 96
    minutes: Annotated[float, Option("Begin nothing that would end later.")] = 9.0
    calib: Annotated[Path | None, Option("Manifest of chats (calib.jsonl, of `texts`).")] = None
    texts: Annotated[Path | None, Option("Directory whose files `texts` reads (Python's own, and packages').")] = None


class SeededFaultsSettings(Settings):
    """Of `bench.studies.seeded_faults`."""

    work: Annotated[Path, Option("Kept files.", show_default="qvl-seeded among temporary files")] = (
        Path(tempfile.gettempdir()) / "qvl-seeded"
    )
    out: Annotated[Path, Option("Directory for table.md and results.json.")] = Path("docs/results/seeded-faults")
    per_task: Annotated[int, Option("Questions of each of the eight tasks.")] = 500
    samples: Annotated[int, Option("Calibration chats.")] = 48
    margin: Annotated[float, Option("Loss, in points, that would not matter.")] = 1.0
    system: Annotated[str | None, Option("Read this one and write no report.")] = None


class StepSettings(Settings):
    """Of `bench.studies.step_profile`."""

    out: Annotated[Path, Option("Directory for trace, step.json and step.md.")]
    concurrency: Annotated[int, Option("Answers under way.")] = 1
    steps: Annotated[int, Option("Steps to profile.")] = 64
    seconds: Annotated[float, Option("Longest wait for the profiled answers, and for the trace.")] = 120.0
    image_sizes: Annotated[str, Option("Images, WIDTHxHEIGHT or text.")] = "448x448"
    serve_arg: Annotated[tuple[str, ...], Option("Argument for vLLM; repeatable.")] = ()


class TimedServerSettings(Settings):
    """Of `bench.studies.timed_server`."""

    port: Annotated[int, Option("Where it listens.")] = 8900
    first: Annotated[float, Option("Ms to the first token.")] = 30.0
    between: Annotated[float, Option("Ms between tokens.")] = 6.0


class TuningSettings(Settings):
    """Of `bench.studies.tuning`."""

    shape: Annotated[Literal["2b", "7b", "72b", "demo"], Option("Of the model: 2b, 7b, 72b; demo is the dry run.")] = (
        "7b"
    )
    out: Annotated[Path, Option("Directory of checkpoints and results.")] = Path("out/tune-bench")
    minutes: Annotated[float, Option("Begin nothing after so long.")] = 1e6
    only: Annotated[str | None, Option("Candidates of qvl tune to try, with commas.")] = None


class KernelSettings(Settings):
    """Of `bench.studies.kernels`."""

    models: Annotated[str, Option("Of those in bench/studies/kernels.py, the most important first.")] = (
        "7b,2b,2.5-3b,3-8b,3-4b,3-2b,72b,2.5-32b,3-32b"
    )
    products: Annotated[Literal["layer", "head"], Option("A decoder layer's, or the output head's.")] = "layer"
    gpus: Annotated[str, Option("Numbers of GPUs that share a layer.")] = "1,2,4,8"
    groups: Annotated[str, Option("Group sizes.")] = "128,64,32"
    seconds: Annotated[float, Option("Begin no shape after so long.")] = 3600.0
    out: Annotated[Path, Option("JSON file of the plans; what it has stays.")] = Path("serve/kernels/plans.json")
