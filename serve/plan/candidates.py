"""What `qvl tune` tries on a machine, and whether the machine is free to be measured on."""

from __future__ import annotations

from serve.settings.backend import Backend, gpu_users
from serve.settings.engine import EngineSettings
from serve.settings.profiles import HOPPER
from toolkit.errors import ServerError

__all__ = ["DEFAULT", "candidates", "refuse_busy_gpu"]

#: The candidate that changes nothing.
DEFAULT = "vllm"


def candidates(
    backend: Backend, card: str, quantized: bool, *, text: bool = False, lossy: bool = False
) -> dict[str, EngineSettings]:
    """Return settings worth trying, by name, vLLM's own first.

    On a GPU: the kernels beside vLLM's own choice, graphs and schedules for few or for many requests. On a CPU there is
    one kernel and no graph: sequences and tokens of a step, and compiling.

    Args:
        backend: where the server computes.
        card: the GPU's name.
        quantized: whether the weights are packed.
        text: whether real questions are asked; only then can guesses from n-grams be judged. Made requests are answered
            beyond their end, which repeats itself, so any guess comes true.
        lossy: also settings that change answers, such as keys and values in 8 bits.
    """
    found = {DEFAULT: EngineSettings()}
    if backend == "cpu":
        found["few-sequences"] = EngineSettings(max_num_seqs=2)
        found["many-sequences"] = EngineSettings(max_num_seqs=16)
        found["short-steps"] = EngineSettings(max_num_batched_tokens=512)
        found["compiled"] = EngineSettings(compile=True)
        if text:
            found["ngram"] = EngineSettings(ngram=3)
        return found
    kernels: list[str | None] = [None]
    if quantized:
        kernels += ["qvl", "marlin", "humming"] if HOPPER.search(card) else ["humming", "triton"]
    for kernel in kernels:
        prefix = f"{kernel}-" if kernel else ""
        if kernel:
            found[kernel] = EngineSettings(kernel=kernel)
        if kernel == "triton":
            continue  # alone first: if it does not win, its schedules will not
        found[f"{prefix}interactivity"] = EngineSettings(kernel=kernel, performance_mode="interactivity")
        found[f"{prefix}throughput"] = EngineSettings(kernel=kernel, performance_mode="throughput")
        found[f"{prefix}long-steps"] = EngineSettings(kernel=kernel, max_num_batched_tokens=16384)
        found[f"{prefix}full-graphs"] = EngineSettings(kernel=kernel, cudagraph_mode="FULL_DECODE_ONLY")
        if text:
            found[f"{prefix}ngram"] = EngineSettings(kernel=kernel, ngram=3)
            found[f"{prefix}ngram-gpu"] = EngineSettings(kernel=kernel, ngram_gpu=3)
    found["synchronous"] = EngineSettings(async_scheduling=False)
    found["no-caches"] = EngineSettings(prefix_caching=False, mm_cache_gb=0)
    found["shared-image-cache"] = EngineSettings(mm_cache_type="shm")
    found["encoder-graphs"] = EngineSettings(encoder_graphs=True)
    if lossy:
        found["fp8-cache"] = EngineSettings(kv_cache_dtype="fp8")
    return found


def refuse_busy_gpu() -> None:
    """Raise ServerError naming the processes that use a GPU: beside them nothing that is measured is true."""
    users = gpu_users()
    if users:
        raise ServerError(
            f"the GPU is in use: {'; '.join(users)}. What is measured beside others is not true: stop them, or "
            "choose a free GPU with CUDA_VISIBLE_DEVICES and say --shared."
        )
