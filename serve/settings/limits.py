"""What a server takes from its clients: every limit of the guard, and the names under which refusals are counted."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from toolkit.errors import ServerError

__all__ = ["REASONS", "SPECIAL_TOKENS", "Limits"]

#: Why a request was refused: the values of the label `reason` of `qvl_refusals_total`.
REASONS = (
    "header",
    "key",
    "route",
    "method",
    "body_size",
    "body_time",
    "body_json",
    "too_deep",
    "image_bytes",
    "image_pixels",
    "image_format",
    "image_frames",
    "image_count",
    "image_url",
    "video",
    "max_tokens",
    "n",
    "prompt_length",
    "field",
    "special_token",
    "rate",
    "concurrency",
    "timeout",
    "draining",
)

#: Tokens that mark turns and pictures in a Qwen2-VL prompt. vLLM tokenizes them out of a client's text as what they
#: are: a question that holds them can end its own turn, speak as the system, or claim pictures that are not there.
#: The marks of grounding (object_ref, box, quad) only annotate text; clients need them, so they are not here.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _number(default: int | float, option: str, help: str, least: float = 1) -> Any:
    return field(default=default, metadata={"option": option, "help": help, "least": least})


def _setting(default: Any, option: str, help: str, repr: bool = True) -> Any:
    return field(default=default, repr=repr, metadata={"option": option, "help": help})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The guard's settings. The metadata of a field holds its command-line `option`, its `help`, its `least` value.

    Raises ServerError, naming the option, for a value that can't be.
    """

    #: File of API keys, one a line; blank lines and lines that start with # are skipped. Read again when it changes.
    api_key_file: str | None = _setting(
        None, "--api-key-file", "File of API keys, one a line; read again when it changes."
    )
    #: One more key. With neither, everyone who reaches the server may use it.
    api_key: str | None = _setting(None, "--api-key", "Key that requests must bring.", repr=False)
    #: Routes beyond the usual, as "METHOD /path". Of their bodies only size, time and JSON are checked.
    allow_routes: tuple[str, ...] = _setting((), "--allow-route", "One more route, such as 'POST /tokenize'.")
    #: Request fields beyond the usual.
    allow_fields: tuple[str, ...] = _setting((), "--allow-field", "One more request field.")
    #: Origins (scheme://host:port) whose pages may call the server from a browser. None: no cross-origin calls.
    cors_origins: tuple[str, ...] = _setting((), "--cors-origin", "Web origin whose pages may call the server.")
    #: Hosts that pictures may be fetched from, as "host" (ports 80 and 443) or "host:port". None: data URLs only.
    image_hosts: tuple[str, ...] = _setting((), "--image-host", "Host that pictures may be fetched from.")
    #: Seconds that fetching one picture may take, redirects and all.
    image_fetch_seconds: float = _number(5.0, "--image-fetch-seconds", "Seconds to fetch one picture.", 0.001)
    #: Bytes of a request's body.
    max_body_bytes: int = _number(32 << 20, "--max-body-bytes", "Bytes of a request.")
    #: Seconds until the whole body must have arrived.
    body_seconds: float = _number(20.0, "--body-seconds", "Seconds until a request must have arrived.", 0.001)
    #: How deep arrays and objects may nest in a body.
    max_json_depth: int = _number(48, "--max-json-depth", "Levels of nesting in a request.", 6)
    #: Pictures in one request.
    max_images: int = _number(8, "--max-images", "Pictures in one request.", 0)
    #: Bytes of one picture, as encoded (base64 removed).
    max_image_bytes: int = _number(10 << 20, "--max-image-bytes", "Bytes of one picture.")
    #: Pixels of one picture, width x height as its header says.
    max_image_pixels: int = _number(24_000_000, "--max-image-pixels", "Pixels of one picture.")
    #: Pixels of all pictures of a request together.
    max_request_pixels: int = _number(48_000_000, "--max-request-pixels", "Pixels of all pictures of a request.")
    #: Frames of one picture. Only the first is ever shown to the model.
    max_image_frames: int = _number(1, "--max-image-frames", "Frames of one picture.")
    #: Whether videos are taken, as data URLs. Only their bytes can be limited, not what they unpack to.
    allow_video: bool = _setting(False, "--allow-video", "Take videos (from clients you trust).")
    #: Largest `max_tokens` (`max_completion_tokens`) that may be asked for.
    max_tokens: int = _number(4096, "--max-tokens", "Largest max_tokens that may be asked for.")
    #: Most answers in one request: `n`, for /v1/completions times the prompts.
    max_n: int = _number(4, "--max-n", "Most answers (n) in one request.")
    #: Characters of all texts of a request together. Tokens are counted by vLLM, against --max-model-len.
    max_prompt_chars: int = _number(100_000, "--max-prompt-chars", "Characters of all texts of a request.")
    #: Requests a minute that one key (without keys: one address) may send; a sixth of them at once. 0: any number.
    rate_per_minute: float = _number(0.0, "--rate", "Requests a minute for each key; 0 for any number.", 0)
    #: Requests of one key (without keys: one address) under way together.
    max_concurrency: int = _number(256, "--max-concurrency", "Requests under way together for each key.")
    #: Seconds until an answer must be complete.
    request_seconds: float = _number(300.0, "--request-timeout", "Seconds until an answer must be complete.", 0.001)
    #: Texts that a request may not hold, see `SPECIAL_TOKENS`.
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            option = item.metadata.get("option", item.name)
            if (least := item.metadata.get("least")) is not None and not value >= least:
                raise ServerError(f"{option} {value:g}: give a number of at least {least:g}.")
            if isinstance(value, list):  # as JSON has it
                object.__setattr__(self, item.name, tuple(value))
        for route in self.allow_routes:
            method, _, path = route.partition(" ")
            if method not in ("GET", "POST") or not path.startswith("/") or " " in path:
                raise ServerError(f"--allow-route {route!r}: give a method and a path, such as 'POST /tokenize'.")
        for origin in self.cors_origins:
            scheme, _, rest = origin.partition("://")
            if scheme not in ("http", "https") or not rest or "/" in rest:
                raise ServerError(f"--cors-origin {origin!r}: give an origin such as https://app.example.com.")
        for host in self.image_hosts:
            if not host or set("/@*? ") & set(host):
                raise ServerError(f"--image-host {host!r}: give a host's name, such as images.example.com.")
        if self.api_key is not None and not (
            self.api_key and self.api_key.isascii() and self.api_key.isprintable() and " " not in self.api_key
        ):
            raise ServerError("--api-key: a key is made of printable ASCII characters without spaces.")

    @property
    def needs_key(self) -> bool:
        """Whether requests must bring a key."""
        return self.api_key is not None or self.api_key_file is not None

    def dumps(self) -> str:
        """Return the settings as JSON, for the environment variable QVL_GUARD of the server's process."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Limits:
        """Return the settings that `dumps` wrote; what is absent keeps its default. Raises ServerError."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ServerError(f"QVL_GUARD can't be read ({error}). `qvl serve` sets it itself: unset it.") from None
