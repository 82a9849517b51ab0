"""A server's settings as the arguments of vLLM's own command line."""

from __future__ import annotations

import json
import math

from serve.settings.config import DEFAULT_GPU_SHARE, ServerConfig
from serve.settings.draft import draft_arguments
from serve.settings.lora import lora_arguments
from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["middleware", "vllm_arguments"]


def vllm_arguments(config: ServerConfig, checkpoint: Checkpoint, name: str) -> list[str]:
    """Return the arguments of the command `vllm` that serve this checkpoint under this name.

    Raises ServerError for settings that do not suit the checkpoint.
    """
    arguments = ["serve", str(checkpoint.path.resolve()), "--served-model-name", name]
    arguments += ["--host", config.host, "--port", str(config.port), *config.tls.arguments()]
    arguments += ["--dtype", config.dtype_for(checkpoint)]
    arguments += ["--max-model-len", str(config.max_model_len_for(checkpoint))]
    arguments += ["--limit-mm-per-prompt", json.dumps(_inputs(config))]
    arguments += ["--shutdown-timeout", str(math.ceil(config.drain))]
    for each in middleware(config):
        arguments += ["--middleware", each]
    if config.guard is not None:
        arguments += ["--disable-fastapi-docs", "--disable-uvicorn-access-log", "--api-server-count", "1"]
    if config.loras:
        arguments += lora_arguments(config.loras)
    if config.draft is not None:
        arguments += draft_arguments(config.draft, config.draft_tokens, checkpoint, on_gpu=config.on_gpu)
    if (sequences := config.max_num_seqs_for()) is not None:
        arguments += ["--max-num-seqs", str(sequences)]
    arguments += _memory(config, checkpoint)
    if not config.compiles:
        arguments += ["--enforce-eager"]
    if not config.parallel.is_one:
        config.parallel.check(checkpoint, config.device)
        arguments += config.parallel.arguments(checkpoint)
    arguments += config.settings.arguments([*arguments, *config.extra])
    return [*arguments, *config.extra]


def middleware(config: ServerConfig) -> list[str]:
    """Return the classes before vLLM's application, the innermost first: vLLM puts the last one outermost."""
    classes = ["serve.app.ready.Proof"]
    if config.play_beside is not None:
        classes += ["serve.app.play.Beside"]
    if config.guard is not None:
        classes += ["serve.guard.app.Guard"]
    if config.play:
        classes += ["serve.app.play.Play"]
    return [*classes, "serve.app.ready.Ready", "serve.app.requestlog.RequestLog"]


def _inputs(config: ServerConfig) -> dict[str, int]:
    """Return how many images and videos vLLM takes in a request."""
    if config.guard is None:
        return {"image": config.images_per_request, "video": config.videos_per_request}
    # at least one, for the probe asks about one
    return {"image": max(1, config.guard.max_images), "video": int(config.guard.allow_video)}


def _memory(config: ServerConfig, checkpoint: Checkpoint) -> list[str]:
    arguments: list[str] = []
    if config.on_gpu or config.gpu_memory_utilization is not None:
        arguments += ["--gpu-memory-utilization", str(config.gpu_memory_utilization or DEFAULT_GPU_SHARE)]
    else:
        arguments += ["--kv-cache-memory-bytes", str(config.kv_bytes_for(checkpoint))]
    if not config.on_gpu:
        # vLLM keeps prepared images in host memory, 4 GiB of them by default.
        arguments += ["--mm-processor-cache-gb", "1"]
        # A compiling boot encodes the largest image there may be to see what memory is left: minutes of
        # attention over 65,536 patches, for a cache whose size is given above.
        arguments += ["--skip-mm-profiling"]
    return arguments
