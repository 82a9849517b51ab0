"""What a server is started with, and what that means in vLLM's arguments and environment."""

from __future__ import annotations

import ipaddress
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from serve.settings.backend import Backend, choose
from serve.settings.environment import GUARD, LOG_FORMAT, PLAY, READY, REQUEST_LOG, VLLM_API_KEY
from serve.settings.limits import Limits
from serve.settings.log_config import write_config
from serve.settings.lora import Lora, lora_arguments
from serve.settings.parallel import Parallel
from serve.settings.profiles import Settings
from serve.settings.ready import ReadySettings
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ServerError
from toolkit.paths import cache_dir, source_root

__all__ = ["DEFAULT_GPU_SHARE", "DTYPE_BYTES", "ServeOptions", "is_loopback", "kv_bytes_per_token"]

#: The dtypes vLLM computes in, and bytes an element takes.
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
#: Share of GPU memory that vLLM may take unless told otherwise; vLLM's own default differs between releases.
DEFAULT_GPU_SHARE = 0.9
#: Longest sequence (prompt, pictures and answer, in tokens) unless told otherwise: an unbounded one reserves memory
#: for 32,768 tokens. A picture takes one token for every 28 x 28 pixels.
_MAX_MODEL_LEN: dict[Backend, int] = {"cpu": 4096, "gpu": 16384}
#: Published Qwen2-VL models (hidden size 1536 and up) leave float16's range in a few activations and then answer
#: "!!!!". Small models do not, and keep float16's three more bits of precision.
_BFLOAT16_FROM_HIDDEN_SIZE = 1024
#: Up to this many cores one process computes and threads are not pinned. Above, vLLM pins threads to the cores of each
#: memory node, for which it needs a process of its own.
_FEW_CORES = 8
#: vLLM flags that say what an option here says already: two answers would be one too many.
_OWN_FLAGS = {
    "--api-key": "--api-key",
    "--host": "--host",
    "--log-config-file": "--log-format",
    "--logging-config": "--log-format",
    "--lora-modules": "--lora",
    "--model": "MODEL",
    "--port": "--port",
    "--served-model-name": "--served-model-name",
    "--shutdown-timeout": "--drain",
    "--uds": "--host and --port",
}
#: vLLM flags that would undo the guard, and how.
_UNGUARDED_FLAGS = {
    "--allowed-local-media-path": "requests could name files of this machine",
    "--allowed-media-domains": "the guard fetches pictures itself, from the hosts that --image-host names",
    "--api-server-count": "each process would count rates and requests under way for itself",
    "--config": "a file could hold any of the flags that are refused here",
    "--enable-log-outputs": "answers would be in the log",
    "--enable-log-requests": "prompts would be in the log",
    "--enable-offline-docs": "its pages are for developers",
    "--grpc": "no guard stands before it",
    "--grpc-port": "no guard stands before it",
    "--headless": "nothing would answer",
    "--middleware": "it would stand before the guard",
    "--omni": "it is another server",
    "--root-path": "the guard tells routes by their path",
    "--trust-request-chat-template": "requests could bring templates of their own",
    "--trust-request-mm-kwargs": "requests could override the limits on pictures",
}
#: Variables of vLLM's that open what the guard closes.
_UNGUARDED_VARIABLES = (
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
    "VLLM_RUST_FRONTEND_PATH",
    "VLLM_USE_RUST_FRONTEND",
)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The settings of one server. None means: chosen for the model and the machine.

    Raises ServerError for settings that can't be.
    """

    #: Address to listen on. The default is reachable from this machine only.
    host: str = "127.0.0.1"
    port: int = 8000
    #: "cpu" or "gpu"; None: QVL_BACKEND, else what is installed and found.
    backend: Backend | None = None
    #: Longest sequence in tokens, pictures included.
    max_model_len: int | None = None
    #: Sequences computed together. None: 8 on a CPU, vLLM's choice on a GPU.
    max_num_seqs: int | None = None
    #: Share of GPU memory (on the CPU: of host memory) that vLLM may take.
    gpu_memory_utilization: float | None = None
    #: Pictures and videos allowed in one request.
    images_per_request: int = 8
    videos_per_request: int = 1
    #: Name under which requests ask for the model. None: the directory's name.
    served_model_name: str | None = None
    #: Compute dtype: "float16", "bfloat16" or "float32". None: bfloat16, but float16 for small models.
    dtype: str | None = None
    #: Key that requests must bring (without a guard: requests to /v1). None: VLLM_API_KEY from the environment, if any.
    api_key: str | None = field(default=None, repr=False)
    #: What is taken from clients. None: no guard, for measurements and tests on this machine.
    guard: Limits | None = None
    #: Listen on an address that others reach, without a key.
    insecure: bool = False
    #: A page at /play to try the server; with another server's address, both side by side.
    play: bool = False
    play_beside: str | None = None
    #: LoRA adapters, each served as a model under its name.
    loras: tuple[Lora, ...] = ()
    #: Seconds until the server must be ready.
    timeout: float = 600.0
    #: Seconds that requests under way may take to finish when the server is stopped.
    drain: float = 30.0
    #: Longest time in seconds without proof that the engine answers; then it is asked a question about a picture.
    probe_every: float = 15.0
    #: Seconds within which that must be answered.
    probe_timeout: float = 20.0
    #: Log lines as vLLM writes them, or as one JSON object each.
    log_format: Literal["text", "json"] = "text"
    #: Compile the model with torch.compile and CUDA graphs: slower to start, faster to answer. None: on a GPU only.
    compile: bool | None = None
    #: How the model is spread over GPUs.
    parallel: Parallel = field(default_factory=Parallel)
    #: What a profile sets; options that are given win.
    settings: Settings = field(default_factory=Settings)
    #: Further arguments for `vllm serve`, appended last, so that they win.
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(0 < self.port < 65536, f"--port {self.port}: a port is a number from 1 to 65535.")
        _require(bool(self.host), "--host is empty: give an address of this machine, such as 127.0.0.1 or 0.0.0.0.")
        _require(self.timeout > 0, f"--timeout {self.timeout:g}: the server can't be ready in no time.")
        _require(self.drain > 0, f"--drain {self.drain:g}: requests under way would be cut off. Give at least 1.")
        _require(self.probe_every >= 1, f"--probe-every {self.probe_every:g}: give at least a second.")
        _require(self.probe_timeout >= 1, f"--probe-timeout {self.probe_timeout:g}: give at least a second.")
        _require(self.log_format in ("text", "json"), f"--log-format {self.log_format}: give text or json.")
        names = [lora.name for lora in self.loras]
        _require(len(set(names)) == len(names), "--lora: two adapters have the same name.")
        for flag, number in (("--max-model-len", self.max_model_len), ("--max-num-seqs", self.max_num_seqs)):
            _require(number is None or number > 0, f"{flag} {number}: give a number of at least 1.")
        share = self.gpu_memory_utilization
        _require(share is None or 0 < share <= 1, f"--gpu-memory-utilization {share}: give a share above 0, up to 1.")
        _require(
            self.dtype is None or self.dtype in DTYPE_BYTES, f"--dtype {self.dtype}: one of {', '.join(DTYPE_BYTES)}."
        )
        _require(self.images_per_request > 0 and self.videos_per_request >= 0, "a server must take at least one image.")
        for argument in self.extra:
            _check_flag(argument, guarded=self.guard is not None)
        object.__setattr__(self, "backend", choose(self.backend))
        if self.api_key is None:
            object.__setattr__(self, "api_key", os.environ.get(VLLM_API_KEY) or None)
        if self.guard is not None and self.api_key is not None:
            object.__setattr__(self, "guard", replace(self.guard, api_key=self.api_key))
        has_key = self.api_key is not None or (self.guard is not None and self.guard.needs_key)
        _require(
            has_key or self.insecure or is_loopback(self.host),
            f"--host {self.host}: anyone who reaches it could use the server. Give --api-key-file or --api-key, keep "
            "to 127.0.0.1, or say --insecure if something else keeps strangers out.",
        )
        if self.play_beside is not None:
            from serve.settings.play import PlayOptions

            PlayOptions(beside=self.play_beside)  # refuses what is no address
            _require(self.play, "--play-beside is a setting of the page: give --play too.")

    @property
    def on_gpu(self) -> bool:
        """Whether the server computes on a GPU."""
        return self.backend == "gpu"

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        return (
            f"http://[{host}]:{self.port}" if ":" in host and not host.startswith("[") else f"http://{host}:{self.port}"
        )

    def dtype_for(self, checkpoint: Checkpoint) -> str:
        """Return the dtype to compute in. Raises ServerError for one that vLLM's AWQ kernels do not have."""
        if self.dtype == "float32" and checkpoint.quantization is not None:
            raise ServerError("--dtype float32: vLLM computes AWQ weights in float16 or bfloat16 only.")
        small = int(checkpoint.text_config["hidden_size"]) < _BFLOAT16_FROM_HIDDEN_SIZE
        return self.dtype or ("float16" if small else "bfloat16")

    def max_model_len_for(self, checkpoint: Checkpoint) -> int:
        """Return the longest sequence in tokens. Raises ServerError for more than the model's positions."""
        positions = int(checkpoint.text_config.get("max_position_embeddings", 32768))
        if self.max_model_len is None:
            return min(positions, self.settings.max_model_len or _MAX_MODEL_LEN["gpu" if self.on_gpu else "cpu"])
        if self.max_model_len > positions:
            raise ServerError(
                f"--max-model-len {self.max_model_len}: {checkpoint.path} has {positions} positions. Give at most that."
            )
        return self.max_model_len

    def max_num_seqs_for(self) -> int | None:
        """Return how many sequences are computed together; None leaves it to vLLM."""
        return self.max_num_seqs or self.settings.max_num_seqs or (None if self.on_gpu else 8)

    def kv_bytes_for(self, checkpoint: Checkpoint) -> int:
        """Return the bytes of KV cache: on the CPU for all sequences at full length, on a GPU the least, for one."""
        sequences = 1 if self.on_gpu else self.max_num_seqs_for() or 1
        # vLLM hands the cache out in blocks of up to 128 tokens and keeps one for itself.
        tokens = sequences * (-(-self.max_model_len_for(checkpoint) // 128) * 128) + 128
        return tokens * kv_bytes_per_token(checkpoint, self.dtype_for(checkpoint))

    def name_for(self, model_dir: Path) -> str:
        """Return the name under which requests ask for the model; `toolkit/demo/checkpoint` is called "demo"."""
        from toolkit.paths import demo_checkpoint

        path = model_dir.resolve()
        return self.served_model_name or ("demo" if path == demo_checkpoint().resolve() else path.name)

    def arguments(self, checkpoint: Checkpoint, name: str) -> list[str]:
        """Return the arguments of the command `vllm` that serve this checkpoint under this name."""
        arguments = ["serve", str(checkpoint.path.resolve()), "--served-model-name", name]
        arguments += ["--host", self.host, "--port", str(self.port)]
        arguments += ["--dtype", self.dtype_for(checkpoint)]
        arguments += ["--max-model-len", str(self.max_model_len_for(checkpoint))]
        limits = {"image": self.images_per_request, "video": self.videos_per_request}
        if self.guard is not None:
            limits = {"image": self.guard.max_images, "video": int(self.guard.allow_video)}
            limits["image"] = max(1, limits["image"])  # the probe asks about one
        arguments += ["--limit-mm-per-prompt", json.dumps(limits)]
        arguments += ["--shutdown-timeout", str(math.ceil(self.drain))]
        for middleware in self.middleware:
            arguments += ["--middleware", middleware]
        if self.guard is not None:
            arguments += ["--disable-fastapi-docs", "--disable-uvicorn-access-log", "--api-server-count", "1"]
        if self.loras:
            arguments += lora_arguments(self.loras)
        if (sequences := self.max_num_seqs_for()) is not None:
            arguments += ["--max-num-seqs", str(sequences)]
        if self.on_gpu or self.gpu_memory_utilization is not None:
            arguments += ["--gpu-memory-utilization", str(self.gpu_memory_utilization or DEFAULT_GPU_SHARE)]
        else:
            arguments += ["--kv-cache-memory-bytes", str(self.kv_bytes_for(checkpoint))]
        if not self.on_gpu:
            # vLLM keeps prepared pictures in host memory, 4 GiB of them by default.
            arguments += ["--mm-processor-cache-gb", "1"]
            # A compiling boot encodes the largest picture there may be to see what memory is left: minutes of
            # attention over 65,536 patches, for a cache whose size is given above.
            arguments += ["--skip-mm-profiling"]
        if not self._compiles:
            arguments += ["--enforce-eager"]
        if not self.parallel.is_one:
            self.parallel.check(checkpoint, "gpu" if self.on_gpu else "cpu")
            arguments += self.parallel.arguments(checkpoint)
        arguments += self.settings.arguments([*arguments, *self.extra])
        return [*arguments, *self.extra]

    @property
    def middleware(self) -> list[str]:
        """Return the classes before vLLM's application, the innermost first: vLLM puts the last one outermost."""
        classes = ["serve.app.ready.Proof"]
        if self.play_beside is not None:
            classes += ["serve.app.play.Beside"]
        if self.guard is not None:
            classes += ["serve.guard.app.Guard"]
        if self.play:
            classes += ["serve.app.play.Play"]
        return [*classes, "serve.app.ready.Ready", "serve.app.requestlog.RequestLog"]

    def environment(
        self, base: Mapping[str, str], name: str, *, began: float | None = None, restarts: int = 0
    ) -> dict[str, str]:
        """Return the environment for vLLM's process: `base`, and what it does not set already.

        API keys travel here, where other users of the machine can't read them.

        Args:
            base: the environment to start from.
            name: the model's name on the server.
            began: when the start was asked for, by time.monotonic().
            restarts: how often the server has been restarted.
        """
        defaults = {
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",  # the model is a local directory by now
            "PYTHONUNBUFFERED": "1",
            "VLLM_LOGGING_COLOR": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if not self.on_gpu:
            if len(os.sched_getaffinity(0)) <= _FEW_CORES:
                defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
            if not self._compiles:
                # vLLM compiles its log-probability ranking even in eager mode, at the first request that asks for
                # them: 3 to 32 s on two cores.
                defaults["TORCHDYNAMO_DISABLE"] = "1"
            else:
                # On a CPU vLLM keeps compiled functions in a form that it can't load again ("finalize_loading"), tries
                # to at each start, and compiles anew. Without, it finds what torch itself has kept.
                defaults["VLLM_USE_AOT_COMPILE"] = "0"
        environment = self.settings.environment({**self.parallel.environment(defaults), **base})
        # Development endpoints let any client reset caches and put the server to sleep.
        environment.pop("VLLM_SERVER_DEV_MODE", None)
        environment.pop(VLLM_API_KEY, None)
        ready = ReadySettings(
            model=name,
            every=self.probe_every,
            limit=self.probe_timeout,
            first_limit=self.timeout,
            drain=self.drain,
            began=began,
            restarts=restarts,
        )
        environment[READY] = ready.dumps()
        if self.guard is not None:
            for variable in _UNGUARDED_VARIABLES:
                environment.pop(variable, None)
            environment[GUARD] = self.guard.dumps()
            environment[REQUEST_LOG] = "1"
        elif self.api_key is not None:
            environment[VLLM_API_KEY] = self.api_key
        if self.play:
            from serve.settings.play import PlayOptions

            environment[PLAY] = PlayOptions(beside=self.play_beside).dumps()
        if self.log_format == "json":
            environment[LOG_FORMAT] = "json"
            environment["VLLM_LOGGING_CONFIG_PATH"] = str(write_config(cache_dir("servers", "logging.json")))
        root = str(source_root())
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, base.get("PYTHONPATH")]))
        return environment

    @property
    def _compiles(self) -> bool:
        asked = self.settings.compile if self.compile is None else self.compile
        return self.on_gpu if asked is None else asked


def kv_bytes_per_token(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the bytes of keys and values that one token leaves behind: 2 x layers x KV heads x head size x element."""
    text = checkpoint.text_config
    head_size = int(text.get("head_dim") or int(text["hidden_size"]) // int(text["num_attention_heads"]))
    return 2 * int(text["num_hidden_layers"]) * int(text["num_key_value_heads"]) * head_size * DTYPE_BYTES[dtype]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ServerError(message)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _check_flag(argument: str, *, guarded: bool) -> None:
    """Refuse a flag of vLLM's that says what an option here says, or would undo the guard."""
    if not argument.startswith("--"):
        return
    flag = argument.partition("=")[0].replace("_", "-")
    for own, ours in _OWN_FLAGS.items():
        _require(not _means(flag, own), f"{flag} after -- : use qvl's own {ours} instead.")
    for unguarded, why in _UNGUARDED_FLAGS.items() if guarded else ():
        _require(not _means(flag, unguarded), f"{flag} after -- would undo the guard: {why}.")


def _means(given: str, flag: str) -> bool:
    """Whether vLLM takes what is given for this flag: it completes flags that are cut short."""
    return given == flag or (len(given) > 4 and flag.startswith(given))
