"""Does one set of 4-bit weights answer alike in each format? GEMM and what it is converted to, by each of the kernels.

    python -m bench.studies formats --out out/formats

A GEMM checkpoint (``--model``; the embedded model, quantized, where none is given) is converted, each format is served
with the same kernel, and asked the same questions about images. Prompts, greedy tokens and the first token's
log-probabilities should be equal to the last digit: they hold the same numbers, and a kernel lays them out before it
runs. A boot for each format and kernel: on a GPU some at once (``--at-once``), on a CPU one after the other. A kernel
that does not start with the model is written down with its reason. ``report.json`` is read by the support matrix: a
format counts there as soon as a server of it has answered.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.load.endpoint import Endpoint
from bench.machine import resources
from bench.machine.environment import command_line, cpu_name, gpu_names, versions
from bench.run.boot import free_ports
from bench.studies.settings import FormatsSettings
from bench.studies.sharing import all_up, beside_others
from bench.verify.compare import spread
from bench.verify.samples import Asked, asked
from bench.verify.served import Served, ask
from toolkit.errors import BenchError, QvlError

__all__ = ["Compared", "compare", "run"]

#: What the others are converted from, and compared with.
_SOURCE = "gemm"
#: The one on a CPU, which vLLM chooses.
_CPU = "cpu"
_KV_GIB = 0.25
#: What is reserved for the largest image is not what is looked at.
_MAX_PIXELS = 512 * 28 * 28

#: What a server answered to all chats, or why it did not start.
Answers = list[Served] | QvlError


@dataclass(frozen=True)
class Compared:
    """Two servers' answers to the same chats."""

    chats: int
    #: Chats with equal prompts, and with equal greedy tokens.
    prompts: int
    answers: int
    #: The furthest that first tokens' log-probabilities are apart, in nats.
    furthest: float

    @property
    def equal(self) -> bool:
        """Whether nothing differs at all."""
        return self.prompts == self.answers == self.chats and self.furthest == 0.0


def compare(one: Sequence[Served], other: Sequence[Served]) -> Compared:
    """Compare two servers' answers, in the order they were asked."""
    pairs = list(zip(one, other, strict=True))
    return Compared(
        chats=len(pairs),
        prompts=sum(a.prompt == b.prompt for a, b in pairs),
        answers=sum(a.tokens == b.tokens for a, b in pairs),
        furthest=max((_apart(a, b) for a, b in pairs), default=0.0),
    )


def _apart(a: Served, b: Served) -> float:
    """Return how far apart the tokens are that both find among their likeliest."""
    return spread(a.first, {token: value for token, value in b.first.items() if token in a.first})


def run(settings: FormatsSettings) -> None:
    """Serve each format with each kernel, write ``report.json``, and exit with an error where answers differ."""
    from serve.settings.config import ServerConfig
    from toolkit.console import note
    from toolkit.console import out as stdout

    began = datetime.now(UTC).isoformat(timespec="seconds")
    on_gpu = ServerConfig().on_gpu
    kernels = [name for name in settings.kernels.split(",") if name] if on_gpu else [_CPU]
    formats = [_SOURCE, *(name for name in settings.formats.split(",") if name and name != _SOURCE)]
    settings.out.mkdir(parents=True, exist_ok=True)
    chats = asked(settings.images, settings.samples)
    answers: dict[tuple[str, str], Answers] = {}
    with tempfile.TemporaryDirectory(prefix="qvl-formats-") as scratch:
        directories = _checkpoints(settings.model, Path(scratch), formats)
        wanted = [(kernel, form) for kernel in kernels for form in formats]
        most = settings.at_once if on_gpu else 1
        for first in range(0, len(wanted), most):
            some = wanted[first : first + most]
            note(", ".join(f"{form} by {kernel}" for kernel, form in some))
            answers |= _answered({each: directories[each[1]] for each in some}, chats, settings.tokens)
            _write(settings.out, began, directories, answers)
    found = _found(answers)
    for kernel, by_format in found.items():
        for form, each in by_format.items():
            said = each if isinstance(each, str) else asdict(each)
            stdout.print(f"{form} by {kernel}: {said}", highlight=False)
    compared = [each for by_format in found.values() for each in by_format.values() if isinstance(each, Compared)]
    differ = [kernel for kernel, by_format in found.items() if not all(map(_fine, by_format.values()))]
    if differ:
        raise BenchError(f"the formats do not answer alike with {', '.join(differ)}: see {settings.out}")
    if not compared:
        raise BenchError(f"no format could be compared with {_SOURCE}: see {settings.out}")


def _fine(each: Compared | str) -> bool:
    return isinstance(each, str) or each.equal


def _found(answers: Mapping[tuple[str, str], Answers]) -> dict[str, dict[str, Compared | str]]:
    """Return, by kernel and format, what is equal to GEMM's answers, or why that is not known."""
    found: dict[str, dict[str, Compared | str]] = {}
    for (kernel, form), given in answers.items():
        source = answers.get((kernel, _SOURCE))
        if isinstance(given, QvlError):
            found.setdefault(kernel, {})[form] = str(given)
        elif form != _SOURCE and isinstance(source, list):
            found.setdefault(kernel, {})[form] = compare(source, given)
    return found


def _checkpoints(model: Path | None, scratch: Path, formats: Sequence[str]) -> dict[str, Path]:
    """Return the same weights by format."""
    from toolkit.formats.convert import convert

    if model is None:
        from toolkit.quantize import quantize

        model = quantize("demo", scratch / _SOURCE, samples=32)
    return {form: model if form == _SOURCE else convert(model, scratch / form, form) for form in formats}


def _answered(
    directories: Mapping[tuple[str, str], Path], chats: Sequence[Asked], tokens: int
) -> dict[tuple[str, str], Answers]:
    """Boot a server for each kernel and checkpoint, all at once, and ask one after the other.

    Nothing is compiled and no prefix is cached: equal weights have to give equal answers, and that needs neither.
    """
    from serve.settings.config import ServerConfig
    from serve.settings.engine import EngineSettings

    starts = {}
    for (each, directory), port in zip(directories.items(), free_ports(len(directories)), strict=True):
        kernel = None if each[0] == _CPU else each[0]
        options = ServerConfig(
            port=port,
            compile=False,
            max_model_len=2048,
            images_per_request=1,
            videos_per_request=0,
            probe_every=3600,
            settings=EngineSettings(kernel=kernel, prefix_caching=False, max_pixels=_MAX_PIXELS),
        )
        starts["/".join(each)] = (str(directory), beside_others(directory, options, _KV_GIB))
    answers: dict[tuple[str, str], Answers] = {}
    with all_up(starts) as servers:
        for each in directories:
            server = servers["/".join(each)]
            if isinstance(server, QvlError):
                answers[each] = server
                continue
            endpoint = Endpoint(server.url, server.model_name, server.api_key)
            answers[each] = [ask(endpoint, chat, tokens) for chat in chats]
    return answers


def _write(out: Path, began: str, directories: Mapping[str, Path], answers: Mapping[tuple[str, str], Answers]) -> None:
    import sys

    served = {form for (_, form), given in answers.items() if isinstance(given, list)}
    systems = {
        form: {"model_type": resources.model_type(path), "quantization": resources.quantization(path)}
        for form, path in directories.items()
        if form in served
    }
    kernels = {
        kernel: {
            form: {"why_not": each} if isinstance(each, str) else {**asdict(each), "equal": each.equal}
            for form, each in by_format.items()
        }
        for kernel, by_format in _found(answers).items()
    }
    report = {
        "command": command_line(sys.argv),
        "model": directories[_SOURCE].name,
        "began": began,
        "environment": {"cpu": cpu_name(), "gpus": gpu_names(), "versions": versions()},
        "systems": systems,
        "kernels": kernels,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
