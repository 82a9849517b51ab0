"""vLLM's own settings that were measured: what a profile sets, as vLLM's arguments and environment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from pydantic import field_validator

from serve.settings.environment import KERNELS as KERNELS_SWITCH
from toolkit.errors import QvlError, ServerError
from toolkit.options import Settings

__all__ = ["KERNELS", "EngineSettings"]

#: Kernels for 4-bit weights with zero points, by their names in vLLM's ``--linear-backend``; "qvl" is our own for few
#: rows (serve/kernels), with Humming for more.
KERNELS = ("qvl", "machete", "humming", "marlin", "conch", "triton")


class EngineSettings(Settings):
    """What a profile sets; None leaves it to vLLM and `serve.settings.config`. Raises ServerError for what is no
    setting."""

    error: ClassVar[type[QvlError]] = ServerError

    #: One of `KERNELS`; vLLM does not start where it can't take a layer.
    kernel: str | None = None
    #: Batch sizes that CUDA graphs are captured for.
    cudagraph_sizes: tuple[int, ...] | None = None
    #: vLLM's ``cudagraph_mode``: NONE, PIECEWISE, FULL, FULL_DECODE_ONLY, FULL_AND_PIECEWISE.
    cudagraph_mode: str | None = None
    #: CUDA graphs for the vision encoder too.
    encoder_graphs: bool | None = None
    #: Passes of its compiler that are switched on, such as ``fuse_norm_quant``.
    passes: tuple[str, ...] = ()
    #: vLLM's own ``--performance-mode``: balanced, interactivity, throughput.
    performance_mode: str | None = None
    #: Compile and capture at all.
    compile: bool | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    max_model_len: int | None = None
    #: Most pixels of an image; larger ones are scaled down.
    max_pixels: int | None = None
    prefix_caching: bool | None = None
    #: GiB of prepared images kept in host memory.
    mm_cache_gb: int | float | None = None
    #: Where they are kept: "lru", a copy in each process, or "shm", memory that the processes share.
    mm_cache_type: str | None = None
    kv_cache_dtype: str | None = None
    async_scheduling: bool | None = None
    #: Tokens guessed at once from the prompt's own n-grams, on the host, which ends asynchronous scheduling.
    ngram: int | None = None
    #: The same, on the GPU, which keeps it.
    ngram_gpu: int | None = None

    @field_validator("kernel")
    @classmethod
    def _known_kernel(cls, kernel: str | None) -> str | None:
        if kernel is not None and kernel not in KERNELS:
            raise ServerError(f"unknown kernel {kernel!r}: one of {', '.join(KERNELS)}.")
        return kernel

    @classmethod
    def read(cls, found: Mapping[str, Any]) -> Self:
        """Make settings of JSON. Raises ServerError for names that are none."""
        unknown = set(found) - set(cls.model_fields)
        if unknown:
            raise ServerError(f"unknown settings in a profile: {', '.join(sorted(unknown))}.")
        return cls(**found)

    def as_dict(self) -> dict[str, Any]:
        """Return what is set."""
        return {name: value for name, value in self if value not in (None, ())}

    def __str__(self) -> str:
        return (
            ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in self.as_dict().items()) or "none"
        )

    def environment(self) -> dict[str, str]:
        """Return the environment variables that the settings need."""
        return {KERNELS_SWITCH: "on" if self.kernel == "qvl" else "off"} if self.kernel else {}

    def arguments(self, given: Iterable[str] = ()) -> list[str]:
        """Return vLLM's arguments; those whose flags are among ``given`` are left out, for the user's word counts.

        ``compile``, ``max_num_seqs`` and ``max_model_len`` are settings of `serve.settings.config.ServerConfig`.
        """
        taken = {argument.partition("=")[0] for argument in given}
        found: dict[str, str | None] = {}
        compilation = self._compilation()
        if compilation and not taken & {"--compilation-config", "-O", "--enforce-eager"}:
            found["--compilation-config"] = json.dumps(compilation)
        for flag, setting in (
            ("--linear-backend", "humming" if self.kernel == "qvl" else self.kernel),
            ("--performance-mode", self.performance_mode),
            ("--max-num-batched-tokens", self.max_num_batched_tokens),
            ("--mm-processor-cache-gb", self.mm_cache_gb),
            ("--mm-processor-cache-type", self.mm_cache_type),
            ("--kv-cache-dtype", self.kv_cache_dtype),
        ):
            if setting is not None:
                found[flag] = f"{setting:g}" if isinstance(setting, float) else str(setting)
        if self.max_pixels is not None:
            found["--mm-processor-kwargs"] = json.dumps({"max_pixels": self.max_pixels})
        for method, tokens in (("ngram", self.ngram), ("ngram_gpu", self.ngram_gpu)):
            if tokens is not None:
                speculation = {"method": method, "num_speculative_tokens": tokens}
                speculation |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
                found["--speculative-config"] = json.dumps(speculation)
        for name, value in (
            ("enable-prefix-caching", self.prefix_caching),
            ("async-scheduling", self.async_scheduling),
        ):
            if value is not None and not taken & {f"--{name}", f"--no-{name}"}:
                found[f"--{name}" if value else f"--no-{name}"] = None
        return [
            word for flag, value in found.items() if flag not in taken for word in (flag, value) if word is not None
        ]

    def _compilation(self) -> dict[str, Any]:
        """Return what is set of vLLM's ``--compilation-config``."""
        found: dict[str, Any] = {}
        if self.cudagraph_sizes is not None:
            found["cudagraph_capture_sizes"] = list(self.cudagraph_sizes)
        if self.cudagraph_mode is not None:
            found["cudagraph_mode"] = self.cudagraph_mode
        if self.encoder_graphs is not None:
            found["cudagraph_mm_encoder"] = self.encoder_graphs
        if self.passes:
            found["pass_config"] = dict.fromkeys(self.passes, True)
        return found


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
