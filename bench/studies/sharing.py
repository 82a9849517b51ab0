"""Servers of a study beside each other on one card, each with the KV cache that it is told to have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.errors import QvlError, ServerError

if TYPE_CHECKING:
    from serve.process.lifecycle import Server
    from serve.settings.config import ServerConfig

__all__ = ["all_up", "beside_others"]

_GIB = 2**30


def beside_others(directory: Path, options: ServerConfig, kv_gib: float) -> ServerConfig:
    """Return the options of a server that shares its GPU; on a CPU they stay as they are.

    Its KV cache has a given size, so it does not measure what memory is left, which the others are taking; the share is
    what has to be free when it starts, not what is taken.

    Args:
        directory: the checkpoint.
        options: what is asked for besides.
        kv_gib: of the KV cache; at least what one sequence at full length needs.
    """
    from serve.process import memory
    from serve.settings.backend import find_gpus
    from toolkit.checkpoint.checkpoint import Checkpoint

    card = max((gpu.total for gpu in find_gpus()), default=0)
    if not card or not options.on_gpu:
        return options
    least = memory.need(Checkpoint.open(directory), options)
    cache = max(int(kv_gib * _GIB), least.kv_cache)
    return options.replaced(
        extra=(*options.extra, "--kv-cache-memory-bytes", str(cache)),
        gpu_memory_utilization=min(0.95, round(least.total / card + 0.01, 3)),
    )


@contextmanager
def all_up(starts: Mapping[str, tuple[str, ServerConfig]]) -> Iterator[dict[str, Server | QvlError]]:
    """Start servers side by side, hand over those that came up and why others did not, and stop all in the end.

    Args:
        starts: by name, the model and its options.
    """
    from serve.process import lifecycle

    pool = ThreadPoolExecutor(max(1, len(starts)))  # a server ends with the thread that started it
    futures = {name: pool.submit(_start, *each) for name, each in starts.items()}
    try:
        yield {name: future.result() for name, future in futures.items()}
    finally:
        for name, (_, options) in starts.items():
            if not futures[name].done():
                with suppress(ServerError):  # not started yet, or gone
                    lifecycle.stop(options.port, drain=False)
        for future in futures.values():
            if not future.cancel() and not isinstance(server := future.result(), QvlError):
                server.stop(drain=False)
        pool.shutdown()


def _start(model: str, options: ServerConfig) -> Server | QvlError:
    from serve.process import lifecycle

    try:
        return lifecycle.start(model, options, attached=True)
    except QvlError as error:
        return error
