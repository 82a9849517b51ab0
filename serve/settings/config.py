"""What a server is started with: one object, from which `qvl serve`'s command line and everything after it derive.

`serve.settings.arguments` makes vLLM's arguments of it, `serve.process.launch` the environment of vLLM's process.
"""

from __future__ import annotations

import functools
import ipaddress
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from serve.settings.backend import Backend, choose
from serve.settings.engine import EngineSettings
from serve.settings.environment import API_KEY, VLLM_API_KEY
from serve.settings.flags import check_flag
from serve.settings.limits import KEYS, Limits
from serve.settings.lora import Lora
from serve.settings.parallel import Parallel
from serve.settings.profiles import Mode, as_mode
from serve.settings.recording import Recording
from serve.settings.tls import Tls
from toolkit.errors import QvlError, ServerError
from toolkit.help import everyday
from toolkit.options import Option, Settings
from toolkit.paths import demo_checkpoint

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["DEFAULT_GPU_SHARE", "DEFAULT_PORT", "DTYPE_BYTES", "ServerConfig", "is_loopback", "kv_bytes_per_token"]

DEFAULT_PORT = 8000
#: The dtypes vLLM computes in, and bytes an element takes.
DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
#: Share of GPU memory that vLLM may take unless told otherwise; vLLM's own default differs between releases.
DEFAULT_GPU_SHARE = 0.9
#: Longest sequence (prompt, images and answer, in tokens) unless told otherwise: an unbounded one reserves memory
#: for 32,768 tokens. An image takes one token for every 28 x 28 pixels, or 32 x 32.
_MAX_MODEL_LEN: dict[Backend, int] = {"cpu": 4096, "gpu": 16384}
#: Published Qwen2-VL models (hidden size 1536 and up) leave float16's range in a few activations and then answer
#: "!!!!". Small models do not, and keep float16's three more bits of precision.
_BFLOAT16_FROM_HIDDEN_SIZE = 1024

_keys, _operation, _page, _speed = (
    functools.partial(Option, panel=panel) for panel in (KEYS, "Operation", everyday("Page"), everyday("Speed"))
)


def _seconds(value: Any, info: ValidationInfo) -> Any:
    """Read a time such as 30s, 2m or 45."""
    if not isinstance(value, str):
        return value
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (value[:-1], units[value[-1]]) if value[-1:] in units else (value, 1.0)
    try:
        return float(number) * unit
    except ValueError:
        option = ServerConfig.option(str(info.field_name))
        raise ServerError(f"{option} {value}: give a time such as 30s or 2m.") from None


def _adapters(value: Any) -> Any:
    """Read `name=DIR` wherever an adapter is given as text."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(Lora.parse(each) if isinstance(each, str) else each for each in value)


def _known_format(value: Any) -> Any:
    _require(value in ("text", "json"), f"--log-format {value}: give text or json.")
    return value


_Seconds = Annotated[float, BeforeValidator(_seconds)]


class ServerConfig(Settings):
    """The settings of one server. None means: chosen for the model and the machine.

    Raises ServerError for settings that can't be.
    """

    error: ClassVar[type[QvlError]] = ServerError

    port: Annotated[int, Option("Port to listen on.")] = DEFAULT_PORT
    host: Annotated[str, Option("Address to listen on; 0.0.0.0 for all, which takes a key or --insecure.")] = (
        "127.0.0.1"
    )
    #: For the command line: `serve.process.lifecycle.start` returns anyway.
    detach: Annotated[bool, Option("Return when it is ready, and leave it running.")] = False
    max_model_len: Annotated[
        int | None, Option("Longest sequence in tokens, images included (4096 on a CPU, 16384 on a GPU).")
    ] = None
    max_num_seqs: Annotated[int | None, Option("Sequences computed together (8 on a CPU, vLLM's choice on a GPU).")] = (
        None
    )
    gpu_memory_utilization: Annotated[
        float | None, Option("Share of GPU memory (on the CPU: of host memory) to take; 0.9 on a GPU.")
    ] = None
    served_model_name: Annotated[str | None, Option("Name that requests ask for (the directory's name).")] = None
    loras: Annotated[
        tuple[Lora, ...],
        BeforeValidator(_adapters),
        Option(
            "LoRA adapter to serve as a model of that name; repeat for several.",
            name="--lora",
            metavar="NAME=DIR",
            type=list[str],
        ),
    ] = ()
    draft: Annotated[
        str | None,
        _speed("Guess tokens ahead: an EAGLE-3 head's directory, or ngram (from the prompt).", metavar="DIR|ngram"),
    ] = None
    draft_tokens: Annotated[int, _speed("Tokens that a draft guesses at once.", least=1)] = 3
    dtype: Annotated[
        str | None, Option("float16, bfloat16 or float32 to compute in (bfloat16; float16 for small models).")
    ] = None
    backend: Annotated[
        Backend | None,
        BeforeValidator(lambda value: value if value is None else choose(value)),
        Option("cpu or gpu; without it QVL_BACKEND, or what is installed and found."),
    ] = None
    timeout: Annotated[float, Option("Seconds until it must be ready.")] = 600.0
    #: Slower to start, faster to answer. None: on a GPU only.
    compile: Annotated[
        bool | None,
        Option(
            "Compile the model: slower to start, faster to answer (on a GPU only).",
            name="--compile/--no-compile",
            show_default=False,
        ),
    ] = None
    #: What `serve.plan.tuned` fills `settings` in from; a start takes them as they are.
    profile: Annotated[
        Mode,
        BeforeValidator(as_mode),
        _speed("Settings measured to be fast: auto, latency, throughput; or off."),
    ] = "auto"
    parallel: Parallel = Parallel()
    play: Annotated[bool, _page("Serve a page to try it, at /play.")] = False
    play_beside: Annotated[str | None, _page("Another server, which the page asks side by side.", metavar="URL")] = None
    drain: Annotated[_Seconds, _operation("Time that requests under way have when it is stopped.", type=str)] = Field(
        default="30s", validate_default=True
    )
    restarts: Annotated[int, _operation("Restarts of a dead server within 10 minutes; 0 never does.", least=0)] = 5
    probe_every: Annotated[_Seconds, _operation("Ask it about an image after so long without an answer.", type=str)] = (
        Field(default="15s", validate_default=True)
    )
    probe_timeout: Annotated[_Seconds, _operation("Time it has to answer that question.", type=str)] = Field(
        default="20s", validate_default=True
    )
    log_format: Annotated[
        Literal["text", "json"],
        BeforeValidator(_known_format),
        _operation("text, or json for one object a line (json without a terminal).", default="auto"),
    ] = "text"
    tls: Tls = Tls()
    recording: Recording = Recording()
    insecure: Annotated[bool, _keys("Let others reach the server without a key.")] = False
    #: Without a guard: of requests to /v1. None: VLLM_API_KEY from the environment, if any.
    api_key: Annotated[
        str | None,
        _keys(
            "Key that requests must bring. Set the variable or give --api-key-file: ps shows a command line.",
            envvar=API_KEY,
            instead=f"the environment variable {API_KEY}, or a file with --api-key-file,",
        ),
    ] = Field(default=None, repr=False)
    #: What is taken from clients. None: no guard, for measurements and tests on this machine.
    guard: Limits | None = None
    #: Images and videos allowed in one request where there is no guard.
    images_per_request: int = 8
    videos_per_request: int = 1
    #: What a profile sets; options that are given win.
    settings: EngineSettings = EngineSettings()
    #: Further arguments for `vllm serve`, appended last, so that they win.
    extra: tuple[str, ...] = ()

    @classmethod
    def from_options(cls, given: Mapping[str, Any]) -> Self:
        """Return the settings for a command line: log lines are JSON where no terminal shows them."""
        asked = given.get("log_format", "auto")
        if asked == "auto":
            asked = "text" if sys.stderr.isatty() or given.get("detach", False) else "json"
        return cls(**{**given, "log_format": asked})

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_numbers()
        for argument in self.extra:
            check_flag(argument, guarded=self.guard is not None)
            speculates = argument.partition("=")[0].replace("_", "-") == "--speculative-config"
            _require(self.draft is None or not speculates, "--speculative-config after -- : --draft says it already.")
        object.__setattr__(self, "backend", choose(self.backend))
        self._check_keys()
        if self.play_beside is not None:
            from serve.settings.play import PlayOptions

            PlayOptions(beside=self.play_beside)  # refuses what is no address
            _require(self.play, "--play-beside is a setting of the page: give --play too.")
        return self

    def _check_numbers(self) -> None:
        _require(0 < self.port < 65536, f"--port {self.port}: a port is a number from 1 to 65535.")
        _require(bool(self.host), "--host is empty: give an address of this machine, such as 127.0.0.1 or 0.0.0.0.")
        _require(self.timeout > 0, f"--timeout {self.timeout:g}: the server can't be ready in no time.")
        _require(self.drain > 0, f"--drain {self.drain:g}: requests under way would be cut off. Give at least 1.")
        _require(self.probe_every >= 1, f"--probe-every {self.probe_every:g}: give at least a second.")
        _require(self.probe_timeout >= 1, f"--probe-timeout {self.probe_timeout:g}: give at least a second.")
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

    def _check_keys(self) -> None:
        """Find the key, hand it to the guard, and refuse to listen to others without one."""
        _require(self.api_key != "", f"--api-key is empty: give a key in {API_KEY}, or leave both out.")
        if self.api_key is None:
            object.__setattr__(self, "api_key", os.environ.get(VLLM_API_KEY) or None)
        if self.guard is not None and self.api_key is not None:
            object.__setattr__(self, "guard", self.guard.replaced(api_key=self.api_key))
        has_key = self.api_key is not None or (self.guard is not None and self.guard.needs_key)
        for name in (API_KEY, VLLM_API_KEY):
            # What was to hold a key, and came out empty, must not mean that none is wanted.
            _require(
                has_key or self.guard is None or os.environ.get(name) != "",
                f"{name} is set and empty: the server would ask nobody for a key. Put one into it, or unset it.",
            )
        _require(
            has_key or self.insecure or is_loopback(self.host),
            f"--host {self.host}: anyone who reaches it could use the server. Give --api-key-file, or a key in "
            f"{API_KEY}, keep to 127.0.0.1, or say --insecure if something else keeps strangers out.",
        )

    @property
    def on_gpu(self) -> bool:
        """Whether the server computes on a GPU."""
        return self.backend == "gpu"

    @property
    def device(self) -> Backend:
        """What the server computes on."""
        return "gpu" if self.on_gpu else "cpu"

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled: what was asked, else what the profile says, else on a GPU only."""
        asked = self.settings.compile if self.compile is None else self.compile
        return self.on_gpu if asked is None else asked

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"{self.tls.scheme}://{bracketed}:{self.port}"

    def dtype_for(self, checkpoint: Checkpoint) -> str:
        """Return the dtype to compute in. Raises ServerError for one that vLLM's 4-bit kernels do not have."""
        if self.dtype == "float32" and checkpoint.quantization is not None:
            raise ServerError("--dtype float32: vLLM computes 4-bit weights in float16 or bfloat16 only.")
        small = int(checkpoint.text_config["hidden_size"]) < _BFLOAT16_FROM_HIDDEN_SIZE
        return self.dtype or ("float16" if small else "bfloat16")

    def max_model_len_for(self, checkpoint: Checkpoint) -> int:
        """Return the longest sequence in tokens. Raises ServerError for more than the model's positions."""
        positions = int(checkpoint.text_config.get("max_position_embeddings", checkpoint.family.max_positions))
        if self.max_model_len is None:
            return min(positions, self.settings.max_model_len or _MAX_MODEL_LEN[self.device])
        if self.max_model_len > positions:
            raise ServerError(
                f"--max-model-len {self.max_model_len}: {checkpoint.path} has {positions} positions. Give at most that."
            )
        return self.max_model_len

    def fitted(self, checkpoint: Checkpoint) -> Self:
        """Return a copy whose guard gives no longer answers than the context holds; vLLM refuses who asks for more."""
        if self.guard is None or self.guard.max_tokens <= (context := self.max_model_len_for(checkpoint)):
            return self
        return self.replaced(guard=self.guard.replaced(max_tokens=context))

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
        path = model_dir.resolve()
        return self.served_model_name or ("demo" if path == demo_checkpoint().resolve() else path.name)


def kv_bytes_per_token(checkpoint: Checkpoint, dtype: str) -> int:
    """Return the bytes of keys and values that one token leaves behind: 2 x layers x KV heads x head size x element."""
    text = checkpoint.text_config
    head_size = checkpoint.family.widths(text)["head"]
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
