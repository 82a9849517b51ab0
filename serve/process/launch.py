"""What vLLM's process is started with: its environment, and the start itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from serve.settings.config import ServerConfig
from serve.settings.environment import DIE_WITH, GUARD, LOG_FORMAT, PLAY, READY, RECORD, REQUEST_LOG, VLLM_API_KEY
from serve.settings.log_config import write_config
from serve.settings.play import PlayOptions
from serve.settings.ready import ReadySettings
from toolkit.paths import cache_dir, source_root

__all__ = ["server_environment", "spawn"]

#: Up to this many cores one process computes and threads are not pinned. Above, vLLM pins threads to the cores of each
#: memory node, for which it needs a process of its own.
_FEW_CORES = 8
#: Variables of vLLM's that open what the guard closes.
_UNGUARDED = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
    "VLLM_RUST_FRONTEND_PATH",
    "VLLM_USE_RUST_FRONTEND",
)


def server_environment(
    config: ServerConfig,
    base: Mapping[str, str],
    name: str,
    *,
    token_pixels: int = 28 * 28,
    began: float | None = None,
    restarts: int = 0,
) -> dict[str, str]:
    """Return the environment for vLLM's process: `base`, and what it does not set already.

    API keys travel here, where other users of the machine can't read them.

    Args:
        config: the server's settings.
        base: the environment to start from.
        name: the model's name on the server.
        token_pixels: how many pixels of an image become one token of it.
        began: when the start was asked for, by time.monotonic().
        restarts: how often the server has been restarted.
    """
    defaults = config.parallel.environment(_defaults(config)) | config.settings.environment()
    environment = {**defaults, **base}
    # Development endpoints let any client reset caches and put the server to sleep.
    environment.pop("VLLM_SERVER_DEV_MODE", None)
    environment.pop(VLLM_API_KEY, None)
    ready = ReadySettings(
        model=name,
        every=config.probe_every,
        limit=config.probe_timeout,
        first_limit=config.timeout,
        drain=config.drain,
        began=began,
        restarts=restarts,
    )
    environment[READY] = ready.dumps()
    if config.guard is not None:
        for variable in _UNGUARDED:
            environment.pop(variable, None)
        environment[GUARD] = config.guard.dumps()
        environment[REQUEST_LOG] = "1"
        environment.pop(RECORD, None)  # what others have set must not have strangers' requests written down
        if config.recording.record is not None:
            environment[RECORD] = config.recording.dumps()
    elif config.api_key is not None:
        environment[VLLM_API_KEY] = config.api_key
    if config.play:
        environment[PLAY] = PlayOptions(beside=config.play_beside, token_pixels=token_pixels).dumps()
    if config.log_format == "json":
        environment[LOG_FORMAT] = "json"
        environment["VLLM_LOGGING_CONFIG_PATH"] = str(write_config(cache_dir("servers", "logging.json")))
    root = str(source_root())
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, base.get("PYTHONPATH")]))
    return environment


def _defaults(config: ServerConfig) -> dict[str, str]:
    """Return what is set unless the user's environment sets it."""
    defaults = {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local directory by now
        "HUMMING_CACHE_DIR": str(cache_dir("humming")),  # what it has compiled, 40 s of a first start
        "PYTHONUNBUFFERED": "1",
        "VLLM_LOGGING_COLOR": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if config.on_gpu:
        return defaults
    if len(os.sched_getaffinity(0)) <= _FEW_CORES:
        defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not config.compiles:
        # vLLM compiles its log-probability ranking even in eager mode, at the first request that asks for
        # them: 3 to 32 s on two cores.
        defaults["TORCHDYNAMO_DISABLE"] = "1"
    else:
        # On a CPU vLLM keeps compiled functions in a form that it can't load again ("finalize_loading"), tries
        # to at each start, and compiles anew. Without, it finds what torch itself has kept.
        defaults["VLLM_USE_AOT_COMPILE"] = "0"
    return defaults


def spawn(arguments: list[str], environment: dict[str, str], log: Path, attached: bool) -> subprocess.Popen[bytes]:
    """Start `vllm` in a process group of its own; where ``attached``, it ends when this process does.

    The one place where a server's process begins: who has a process that has imported vLLM already replaces this.

    Args:
        arguments: of the command `vllm`.
        environment: all of it.
        log: the file that its output is appended to.
        attached: end it when this process ends, however that ends.
    """
    if attached:
        environment = {**environment, DIE_WITH: str(os.getpid())}
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "serve.app.server", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
