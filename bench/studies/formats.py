"""Does one set of 4-bit weights answer alike in each format? GEMM and compressed-tensors, by each of vLLM's kernels.

    python -m bench.studies formats --out out/formats

A GEMM checkpoint (``--model``; the embedded model, quantized, where none is given) is converted, both are served with
the same kernel, one after the other, and asked the same questions about images. Their prompts, greedy tokens and the
first token's log-probabilities should be equal to the last digit: they hold the same numbers, and a kernel lays them
out before it runs. Two boots a kernel. ``report.json`` is read by the support matrix.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench.load.endpoint import Endpoint
from bench.machine import resources
from bench.machine.environment import command_line, cpu_name, gpu_names, versions
from bench.run.boot import free_ports
from bench.studies.settings import FormatsSettings
from bench.verify.compare import spread
from bench.verify.samples import Asked, asked
from bench.verify.served import Served, ask
from toolkit.errors import BenchError

__all__ = ["Compared", "compare", "run"]

FORMATS = ("gemm", "compressed-tensors")


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
    """Serve both formats with each kernel, write ``report.json``, and exit with an error where answers differ."""
    from serve.settings.config import ServerConfig
    from toolkit.console import note
    from toolkit.console import out as stdout

    began = datetime.now(UTC).isoformat(timespec="seconds")
    on_gpu = ServerConfig().on_gpu
    kernels = [name for name in settings.kernels.split(",") if name] if on_gpu else [""]
    settings.out.mkdir(parents=True, exist_ok=True)
    chats = asked(settings.images, settings.samples)
    found: dict[str, Compared] = {}
    with tempfile.TemporaryDirectory(prefix="qvl-formats-") as scratch:
        directories = _checkpoints(settings.model, Path(scratch))
        for kernel in kernels:
            answers = []
            for form in FORMATS:
                note(f"{form}, {kernel or 'the kernel of this CPU'}")
                answers.append(_served(directories[form], kernel, chats, settings.tokens))
            found[kernel or "cpu"] = compare(*answers)
            _write(settings.out, began, directories, found)
            stdout.print(f"{kernel or 'cpu'}: {asdict(found[kernel or 'cpu'])}", highlight=False)
    differ = [kernel for kernel, each in found.items() if not each.equal]
    if differ:
        raise BenchError(
            f"GEMM and compressed-tensors do not answer alike with {', '.join(differ)}: see {settings.out}"
        )


def _checkpoints(model: Path | None, scratch: Path) -> dict[str, Path]:
    """Return the same weights by format."""
    from toolkit.formats.convert import convert

    if model is None:
        from toolkit.quantize import quantize

        model = quantize("demo", scratch / "gemm", samples=32)
    return {"gemm": model, FORMATS[1]: convert(model, scratch / FORMATS[1], FORMATS[1])}


def _served(directory: Path, kernel: str, chats: Sequence[Asked], tokens: int) -> list[Served]:
    from serve.process.lifecycle import start
    from serve.settings.config import ServerConfig

    extra = ("--linear-backend", kernel) if kernel else ()
    with start(str(directory), ServerConfig(port=free_ports(1)[0], extra=extra), attached=True) as server:
        endpoint = Endpoint(server.url, server.model_name, server.api_key)
        return [ask(endpoint, chat, tokens) for chat in chats]


def _write(out: Path, began: str, directories: dict[str, Path], found: dict[str, Compared]) -> None:
    import sys

    systems = {
        form: {"model_type": resources.model_type(path), "quantization": resources.quantization(path)}
        for form, path in directories.items()
    }
    report = {
        "command": command_line(sys.argv),
        "began": began,
        "environment": {"cpu": cpu_name(), "gpus": gpu_names(), "versions": versions()},
        "systems": systems,
        "kernels": {kernel: {**asdict(each), "equal": each.equal} for kernel, each in found.items()},
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
