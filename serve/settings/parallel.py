"""More than one GPU: what vLLM is told to spread a model, checked against the model and the machine before the boot.

Tensor parallel (tp) splits every layer, pipeline parallel (pp) gives each GPU some of the layers, data parallel (dp)
runs whole copies that share the requests. Over several machines the processes are Ray's, over one vLLM's own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import model_validator

from serve.settings.backend import Backend, find_gpus
from toolkit.errors import QvlError, ServerError
from toolkit.help import everyday
from toolkit.options import Option, Settings

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["Parallel", "visible_gpus"]


_speed = functools.partial(Option, panel=everyday("Speed"))


class Parallel(Settings):
    """How a model is spread. Raises ServerError for numbers that can't be."""

    error: ClassVar[type[QvlError]] = ServerError

    tp: Annotated[int, _speed("GPUs that split every layer.")] = 1
    dp: Annotated[int, _speed("Copies of the model, on GPUs of their own.")] = 1
    pp: Annotated[int, _speed("Stages, each with some of the layers.")] = 1
    #: Ray places the processes, over the machines of the cluster that this one belongs to.
    ray: Annotated[bool, _speed("Spread over the machines of a Ray cluster.")] = False

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        for flag, number in (("--tp", self.tp), ("--dp", self.dp), ("--pp", self.pp)):
            if number < 1:
                raise ServerError(f"{flag} {number}: give a number of at least 1.")
        return self

    @property
    def gpus(self) -> int:
        """GPUs in all; on the CPU, processes."""
        return self.tp * self.dp * self.pp

    @property
    def is_one(self) -> bool:
        """Whether nothing is spread."""
        return self.gpus == 1 and not self.ray

    def check(self, checkpoint: Checkpoint, backend: Backend, gpus: int | None = None) -> None:
        """Raise ServerError, saying what would work, for what vLLM can't do with this model on this machine.

        Args:
            gpus: how many there are; None looks. Ray's cluster is not asked: it waits for nodes that join.
        """
        if self.ray and backend == "cpu":
            raise ServerError("--ray on a CPU: vLLM's CPU build does not run under Ray (seen in 0.32.0).")
        if self.ray and find_spec("ray") is None:
            raise ServerError(
                "--ray: Ray is not installed. Run `pip install ray` on every machine of the cluster, into the "
                "environment that vLLM is in, and `ray start` (docs/multi-gpu.md)."
            )
        self._check_tp(checkpoint, backend)
        if self.pp > checkpoint.num_layers:
            raise ServerError(
                f"--pp {self.pp}: {checkpoint.path} has {checkpoint.num_layers} layers, and each stage needs one. "
                f"Give at most --pp {checkpoint.num_layers}."
            )
        if backend == "cpu":
            if self.pp > 1:
                raise ServerError(
                    "--pp on a CPU: vLLM's CPU build starts with it and dies at the first request (seen in 0.32.0). "
                    "Use --tp or --dp."
                )
            return
        found = visible_gpus() if gpus is None else gpus
        if not self.ray and self.gpus > found:
            raise ServerError(
                f"--tp {self.tp} --dp {self.dp} --pp {self.pp} needs {self.gpus} GPUs, and this machine has {found}. "
                f"{_what_fits(checkpoint, found)} Over several machines, give --ray."
            )

    def _check_tp(self, checkpoint: Checkpoint, backend: Backend) -> None:
        from toolkit.checkpoint.engines import cpu_obstacle, obstacle, padding, tensor_parallel

        reason = obstacle(checkpoint, self.tp)
        if reason is None and backend == "cpu":
            reason = cpu_obstacle(checkpoint, self.tp)
        if reason is None:
            return
        works = [size for size, why in tensor_parallel(checkpoint).items() if why is None]
        advice = [f"--tp {' or '.join(map(str, works))} works"]
        if padding(checkpoint, self.tp) is not None:
            advice.append(f"`qvl convert {checkpoint.path} --out DIR --pad-tp {self.tp}` makes {self.tp} work")
        if backend == "gpu":
            advice.append(f"--pp {self.tp} splits whole layers instead")
        raise ServerError(f"--tp {self.tp}: {reason} ({checkpoint.path}). {'; '.join(advice)}.")

    def arguments(self, checkpoint: Checkpoint) -> list[str]:
        """Return vLLM's arguments; none where nothing is spread."""
        from toolkit.checkpoint.engines import vision_is_whole

        arguments: list[str] = []
        for flag, number in (
            ("--tensor-parallel-size", self.tp),
            ("--data-parallel-size", self.dp),
            ("--pipeline-parallel-size", self.pp),
        ):
            arguments += [flag, str(number)] if number > 1 else []
        if self.dp > 1:
            # vLLM would start one for each copy, and readiness, limits and counters are those of a process.
            arguments += ["--api-server-count", "1"]
        if self.ray:
            arguments += ["--distributed-executor-backend", "ray"]
            arguments += ["--data-parallel-backend", "ray"] if self.dp > 1 else []
        if self.tp > 1 and vision_is_whole(checkpoint, self.tp):
            arguments += ["--mm-encoder-tp-mode", "data"]
        return arguments

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return ``base`` without what keeps vLLM in one process."""
        alone = () if self.is_one else ("VLLM_ENABLE_V1_MULTIPROCESSING",)
        return {name: value for name, value in base.items() if name not in alone}


def visible_gpus() -> int:
    """Return how many GPUs vLLM will see: nvidia-smi's, or those of them that CUDA_VISIBLE_DEVICES names."""
    found, named = len(find_gpus()), os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return found
    return min(found, len([part for part in named.split(",") if part.strip() not in ("", "-1")]))


def _what_fits(checkpoint: Checkpoint, gpus: int) -> str:
    from toolkit.checkpoint.engines import tensor_parallel

    if gpus < 2:
        return "Leave these options out."
    most = max(size for size, why in tensor_parallel(checkpoint).items() if why is None and size <= gpus)
    return f"--dp {gpus} works" + (f", or --tp {most}." if most > 1 else ".")
