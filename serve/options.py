"""What a server is started with, and what that means in vLLM's arguments and environment."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from serve.backend import Backend, choose
from toolkit.checkpoint import Checkpoint
from toolkit.errors import ServerError

__all__ = ["DEFAULT_GPU_SHARE", "DTYPE_BYTES", "ServeOptions", "kv_bytes_per_token"]

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
    "--model": "MODEL",
    "--port": "--port",
    "--served-model-name": "--served-model-name",
    "--uds": "--host and --port",
}


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
    #: Key that requests to /v1 must bring. None: VLLM_API_KEY from the environment, if any.
    api_key: str | None = field(default=None, repr=False)
    #: Seconds until the server must be ready.
    timeout: float = 600.0
    #: Seconds that requests under way may take to finish when the server is stopped.
    shutdown_timeout: int = 30
    #: Compile the model with torch.compile and CUDA graphs: slower to start, faster to answer. None: on a GPU only.
    compile: bool | None = None
    #: Further arguments for `vllm serve`, appended last, so that they win.
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require(0 < self.port < 65536, f"--port {self.port}: a port is a number from 1 to 65535.")
        _require(bool(self.host), "--host is empty: give an address of this machine, such as 127.0.0.1 or 0.0.0.0.")
        _require(self.timeout > 0, f"--timeout {self.timeout:g}: the server can't be ready in no time.")
        _require(self.shutdown_timeout > 0, "shutdown_timeout is 0: requests under way would be cut off.")
        for flag, number in (("--max-model-len", self.max_model_len), ("--max-num-seqs", self.max_num_seqs)):
            _require(number is None or number > 0, f"{flag} {number}: give a number of at least 1.")
        share = self.gpu_memory_utilization
        _require(share is None or 0 < share <= 1, f"--gpu-memory-utilization {share}: give a share above 0, up to 1.")
        _require(
            self.dtype is None or self.dtype in DTYPE_BYTES, f"--dtype {self.dtype}: one of {', '.join(DTYPE_BYTES)}."
        )
        _require(self.images_per_request > 0 and self.videos_per_request >= 0, "a server must take at least one image.")
        for argument in self.extra:
            flag = argument.partition("=")[0]
            _require(flag not in _OWN_FLAGS, f"{flag} after -- : use qvl's own {_OWN_FLAGS.get(flag)} instead.")
        object.__setattr__(self, "backend", choose(self.backend))
        if self.api_key is None:
            object.__setattr__(self, "api_key", os.environ.get("VLLM_API_KEY") or None)

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
            return min(positions, _MAX_MODEL_LEN["gpu" if self.on_gpu else "cpu"])
        if self.max_model_len > positions:
            raise ServerError(
                f"--max-model-len {self.max_model_len}: {checkpoint.path} has {positions} positions. Give at most that."
            )
        return self.max_model_len

    def max_num_seqs_for(self) -> int | None:
        """Return how many sequences are computed together; None leaves it to vLLM."""
        return self.max_num_seqs or (None if self.on_gpu else 8)

    def kv_bytes_for(self, checkpoint: Checkpoint) -> int:
        """Return the bytes of KV cache: on the CPU for all sequences at full length, on a GPU the least, for one."""
        sequences = 1 if self.on_gpu else self.max_num_seqs_for() or 1
        # vLLM hands the cache out in blocks of up to 128 tokens and keeps one for itself.
        tokens = sequences * (-(-self.max_model_len_for(checkpoint) // 128) * 128) + 128
        return tokens * kv_bytes_per_token(checkpoint, self.dtype_for(checkpoint))

    def name_for(self, model_dir: Path) -> str:
        """Return the name under which requests ask for the model; `toolkit/demo/checkpoint` is called "demo"."""
        from toolkit.demo import checkpoint_dir

        path = model_dir.resolve()
        return self.served_model_name or ("demo" if path == checkpoint_dir().resolve() else path.name)

    def arguments(self, checkpoint: Checkpoint, name: str) -> list[str]:
        """Return the arguments of the command `vllm` that serve this checkpoint under this name."""
        arguments = ["serve", str(checkpoint.path.resolve()), "--served-model-name", name]
        arguments += ["--host", self.host, "--port", str(self.port)]
        arguments += ["--dtype", self.dtype_for(checkpoint)]
        arguments += ["--max-model-len", str(self.max_model_len_for(checkpoint))]
        limits = {"image": self.images_per_request, "video": self.videos_per_request}
        arguments += ["--limit-mm-per-prompt", json.dumps(limits)]
        arguments += ["--shutdown-timeout", str(self.shutdown_timeout)]
        if (sequences := self.max_num_seqs_for()) is not None:
            arguments += ["--max-num-seqs", str(sequences)]
        if self.on_gpu or self.gpu_memory_utilization is not None:
            arguments += ["--gpu-memory-utilization", str(self.gpu_memory_utilization or DEFAULT_GPU_SHARE)]
        else:
            arguments += ["--kv-cache-memory-bytes", str(self.kv_bytes_for(checkpoint))]
        if not self.on_gpu:
            # vLLM keeps prepared pictures in host memory, 4 GiB of them by default.
            arguments += ["--mm-processor-cache-gb", "1"]
        if not self._compiles:
            arguments += ["--enforce-eager"]
        return [*arguments, *self.extra]

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """Return the environment for vLLM's process: `base`, and what it does not set already.

        The API key travels here, where other users of the machine can't read it.
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
        environment = {**defaults, **base}
        # Development endpoints let any client reset caches and put the server to sleep.
        environment.pop("VLLM_SERVER_DEV_MODE", None)
        if self.api_key is not None:
            environment["VLLM_API_KEY"] = self.api_key
        root = str(Path(__file__).resolve().parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, base.get("PYTHONPATH")]))
        return environment

    @property
    def _compiles(self) -> bool:
        return self.on_gpu if self.compile is None else self.compile


def kv_bytes_per_token(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the bytes of keys and values that one token leaves behind: 2 x layers x KV heads x head size x element."""
    text = checkpoint.text_config
    head_size = int(text.get("head_dim") or int(text["hidden_size"]) // int(text["num_attention_heads"]))
    return 2 * int(text["num_hidden_layers"]) * int(text["num_key_value_heads"]) * head_size * DTYPE_BYTES[dtype]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ServerError(message)
