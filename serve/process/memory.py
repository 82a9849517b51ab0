"""Whether a model fits before it is booted: vLLM finds out only after a minute of loading."""

from __future__ import annotations

from dataclasses import dataclass

from serve.settings.backend import find_gpus, gpu_users
from serve.settings.config import DEFAULT_GPU_SHARE, DTYPE_BYTES, ServerConfig
from serve.settings.draft import draft_bytes
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ResourceError, ResourceInUse
from toolkit.host import available_memory, memory_limit

__all__ = ["MemoryNeed", "check", "need"]

_GIB = 1 << 30
#: What vLLM takes beside weights and KV cache. CPU: measured, two processes with torch and transformers loaded, no
#: model to speak of. GPU: CUDA's context and the activations of an image; vLLM measures the true figure itself.
_OVERHEAD = {"cpu": int(1.5 * _GIB), "gpu": int(1.5 * _GIB)}
#: A process beside the first on a CPU: two took 2.0 GiB in all with the embedded model, where one took 1.1.
_PROCESS = int(0.9 * _GIB)


@dataclass(frozen=True)
class MemoryNeed:
    """The least memory a server takes, in bytes."""

    weights: int
    kv_cache: int
    overhead: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv_cache + self.overhead

    def __str__(self) -> str:
        return (
            f"about {self.total / _GIB:.1f} GiB (weights {self.weights / _GIB:.1f}, "
            f"KV cache {self.kv_cache / _GIB:.1f}, vLLM itself {self.overhead / _GIB:.1f})"
        )


def need(checkpoint: Checkpoint, config: ServerConfig) -> MemoryNeed:
    """Estimate the least memory that serving takes. Packed weights keep their size, others take the compute dtype's."""
    element = DTYPE_BYTES[config.dtype_for(checkpoint)]
    weights = sum(t.nbytes if t.dtype == "I32" else t.numel * element for t in checkpoint.tensors.values())
    weights += draft_bytes(config.draft)
    cache, overhead = config.kv_bytes_for(checkpoint), _OVERHEAD["gpu" if config.on_gpu else "cpu"]
    spread = config.parallel
    if config.on_gpu:  # of each
        return MemoryNeed(weights // (spread.tp * spread.pp), cache // (spread.tp * spread.pp), overhead)
    # each process beyond the first has torch and transformers of its own
    return MemoryNeed(weights * spread.dp, cache * spread.dp, overhead + (spread.gpus - 1) * _PROCESS)


def check(checkpoint: Checkpoint, config: ServerConfig) -> None:
    """Raise ResourceError, with the figures, when the model can't fit; ResourceInUse when it could, were others gone.

    Models spread over several GPUs by one of vLLM's own flags are left for vLLM to judge.
    """
    least = need(checkpoint, config)
    if not config.on_gpu:
        available = available_memory()
        if least.total > available:
            others = least.total <= memory_limit()
            kind, stop = (ResourceInUse, "Stop what else takes memory, or: ") if others else (ResourceError, "")
            raise kind(
                f"{checkpoint.path} needs {least} of memory, and {available / _GIB:.1f} GiB are available. "
                f"{stop}{_advice(checkpoint, config)}"
            )
        return
    if config.parallel.ray or any(argument.partition("=")[0] in _PARALLEL for argument in config.extra):
        return
    gpus = sorted(find_gpus(), key=lambda g: g.free, reverse=True)[: config.parallel.gpus]
    gpu = gpus[-1] if gpus else None
    if gpu is None:
        raise ResourceError("nvidia-smi lists no GPU. Serve with --backend cpu, or check the driver with `nvidia-smi`.")
    share = config.gpu_memory_utilization or DEFAULT_GPU_SHARE
    figures = f"{gpu.name} has {gpu.free / _GIB:.1f} of {gpu.total / _GIB:.1f} GiB free"
    if least.total > gpu.total * share:
        raise ResourceError(
            f"{checkpoint.path} needs {least} of GPU memory; {figures}, of which vLLM may take a share of {share:g}. "
            f"{_advice(checkpoint, config)}"
        )
    if gpu.total * share > gpu.free:
        smaller = int(100 * gpu.free / gpu.total) / 100
        enough = least.total <= gpu.total * smaller
        raise ResourceInUse(
            f"vLLM would reserve {gpu.total * share / _GIB:.1f} GiB (a share of {share:g}), and {figures}. "
            f"Stop what uses the GPU{_named(gpu_users())}"
            + (f", or give --gpu-memory-utilization {smaller:g}." if enough else f": the model needs {least}.")
        )


def _named(users: list[str]) -> str:
    return f" ({'; '.join(users)})" if users else ""


_PARALLEL = {"--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp"}


def _advice(checkpoint: Checkpoint, config: ServerConfig) -> str:
    smaller = f"a smaller --max-model-len (now {config.max_model_len_for(checkpoint)})"
    if not config.on_gpu:
        smaller += f" or --max-num-seqs (now {config.max_num_seqs_for()})"
    if checkpoint.quantization is None:
        return f"Quantize it first (`qvl quantize`: weights shrink to about a third), or give {smaller}."
    return f"Give {smaller}, or serve a smaller model."
