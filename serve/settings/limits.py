"""What a server takes from its clients: every limit of the guard, and the names under which refusals are counted."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from pydantic import Field, ValidationError, model_validator

from toolkit.errors import QvlError, ServerError
from toolkit.help import everyday
from toolkit.options import Option, Settings

__all__ = ["KEYS", "MORE_ROUTES", "REASONS", "SPECIAL_TOKENS", "Limits"]

#: Why a request was refused: the values of the label `reason` of `qvl_refusals_total`.
REASONS = (
    "header",
    "connections",
    "host",
    "key",
    "key_expired",
    "scope",
    "route",
    "method",
    "model",
    "body_size",
    "body_time",
    "body_json",
    "too_deep",
    "image_bytes",
    "image_pixels",
    "image_format",
    "image_frames",
    "image_count",
    "image_memory",
    "image_url",
    "video",
    "max_tokens",
    "n",
    "prompt_length",
    "field",
    "special_token",
    "tokens",
    "rate",
    "concurrency",
    "timeout",
    "draining",
)

#: Tokens that mark turns and images in a Qwen2-VL prompt. vLLM tokenizes them out of a client's text as what they
#: are: a question that holds them can end its own turn, speak as the system, or claim images that are not there.
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


#: Routes beyond the usual that take a body of which everything is known and checked, see `serve.guard.fields`.
MORE_ROUTES = (
    "/classify",
    "/detokenize",
    "/pooling",
    "/rerank",
    "/score",
    "/tokenize",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/score",
    "/v2/rerank",
)


_guard = functools.partial(Option, panel="Guard")
#: Heading of the options that say who may ask.
KEYS = everyday("Keys")


_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


@dataclass(frozen=True)
class _Least:
    """The smallest value of a field."""

    value: float


class Limits(Settings):
    """The guard's settings. Raises ServerError, naming the option, for a value that can't be."""

    error: ClassVar[type[QvlError]] = ServerError

    #: See `serve.guard.keyfile`. Blank lines and lines that start with # are skipped.
    api_key_file: Annotated[
        str | None,
        Option(
            "File of API keys, one a line: KEY [name= expires= scope= tokens-per-day=]. Read again when it changes.",
            panel=KEYS,
        ),
    ] = None
    #: One more key. With neither, everyone who reaches the server may use it. The option is the server's.
    api_key: str | None = Field(default=None, repr=False)
    #: Routes beyond the usual, as "METHOD /path": any with GET, those of `MORE_ROUTES` with POST.
    allow_routes: Annotated[
        tuple[str, ...], _guard("One more route, such as 'POST /tokenize'.", name="--allow-route")
    ] = ()
    #: Request fields beyond the usual.
    allow_fields: Annotated[tuple[str, ...], _guard("One more request field.", name="--allow-field")] = ()
    #: Origins (scheme://host:port) whose pages may call the server from a browser. None: no cross-origin calls.
    cors_origins: Annotated[
        tuple[str, ...], _guard("Web origin whose pages may call the server.", name="--cors-origin")
    ] = ()
    #: Names under which clients without keys reach the server, beside addresses and those of this machine.
    hosts: Annotated[
        tuple[str, ...], _guard("Name of a server without keys, as clients call it.", name="--allow-host")
    ] = ()
    #: Hosts that images may be fetched from, as "host" (ports 80 and 443) or "host:port". None: data URLs only.
    image_hosts: Annotated[tuple[str, ...], _guard("Host that images may be fetched from.", name="--image-host")] = ()
    #: Redirects and all.
    image_fetch_seconds: Annotated[float, _guard("Seconds to fetch one image."), _Least(0.001)] = 5.0
    max_body_bytes: Annotated[int, _guard("Bytes of a request."), _Least(1)] = 32 << 20
    body_seconds: Annotated[float, _guard("Seconds until a request must have arrived."), _Least(0.001)] = 20.0
    #: How deep arrays and objects may nest in a body.
    max_json_depth: Annotated[int, _guard("Levels of nesting in a request."), _Least(6)] = 48
    max_images: Annotated[int, _guard("Images in one request."), _Least(0)] = 8
    #: As encoded (base64 removed).
    max_image_bytes: Annotated[int, _guard("Bytes of one image."), _Least(1)] = 10 << 20
    #: Width x height as its header says.
    max_image_pixels: Annotated[int, _guard("Pixels of one image."), _Least(1)] = 24_000_000
    max_request_pixels: Annotated[int, _guard("Pixels of all images of a request."), _Least(1)] = 48_000_000
    #: From the admission of a request until its first token; one alone is always let in. 0: what a quarter of the
    #: memory holds, which is the machine's or its control group's.
    max_decoded_pixels: Annotated[
        int, _guard("Pixels decoded at one time, for all requests.", show_default="by memory"), _Least(0)
    ] = 0
    #: Only the first is ever shown to the model.
    max_image_frames: Annotated[int, _guard("Frames of one image."), _Least(1)] = 1
    #: As data URLs. Only their bytes can be limited, not what they unpack to.
    allow_video: Annotated[bool, _guard("Take videos (from clients you trust).")] = False
    #: Of `max_tokens` and `max_completion_tokens`; set where neither is given. A shorter context makes it less.
    max_tokens: Annotated[int, _guard("Largest max_tokens that may be asked for; at most the context."), _Least(1)] = (
        4096
    )
    #: For /v1/completions `n` times the prompts.
    max_n: Annotated[int, _guard("Most answers (n) in one request."), _Least(1)] = 4
    #: Tokens are counted by vLLM, against --max-model-len.
    max_prompt_chars: Annotated[int, _guard("Characters of all texts of a request."), _Least(1)] = 100_000
    #: Of the grammars that are compiled from a request's JSON schemas, see `serve.guard.schema`.
    max_schema_states: Annotated[int, _guard("States of the grammars of a request's JSON schemas."), _Least(1)] = 1500
    #: Without keys: of each address. A sixth of them may come at once.
    rate_per_minute: Annotated[
        float, _guard("Requests a minute for each key; 0 for any number.", name="--rate"), _Least(0)
    ] = 0.0
    #: Without keys: of each address.
    max_concurrency: Annotated[int, _guard("Requests under way together for each key."), _Least(1)] = 256
    #: Open at one time; those beyond are closed as they come.
    max_connections: Annotated[int, _guard("Connections in all."), _Least(1)] = 4096
    #: Behind a proxy all come from the proxy's address: then give it as many as --max-connections.
    max_address_connections: Annotated[int, _guard("Connections from one address."), _Least(1)] = 512
    request_seconds: Annotated[
        float, _guard("Seconds until an answer must be complete.", name="--request-timeout"), _Least(0.001)
    ] = 300.0
    #: Texts that a request may not hold, see `SPECIAL_TOKENS`.
    special_tokens: tuple[str, ...] = SPECIAL_TOKENS

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            for least in field.metadata:
                if isinstance(least, _Least) and not value >= least.value:
                    option = self.option(name)
                    raise ServerError(f"{option} {value:g}: give a number of at least {least.value:g}.")
        self._check_names()
        return self

    def _check_names(self) -> None:
        for route in self.allow_routes:
            method, _, path = route.partition(" ")
            if method not in ("GET", "POST") or not path.startswith("/") or " " in path:
                raise ServerError(f"--allow-route {route!r}: give a method and a path, such as 'POST /tokenize'.")
            if method == "POST" and path not in MORE_ROUTES:
                raise ServerError(
                    f"--allow-route {route!r}: what it makes of images, addresses and lengths can't be checked. With "
                    f"POST there are {', '.join(MORE_ROUTES)}; for all else clients use /v1/chat/completions."
                )
        for name in self.hosts:
            if not _HOST.fullmatch(name):
                raise ServerError(f"--allow-host {name!r}: give a name such as qvl.example.com, without a port.")
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
        return json.dumps(self.model_dump())

    @classmethod
    def loads(cls, text: str) -> Limits:
        """Return the settings that `dumps` wrote; what is absent keeps its default. Raises ServerError."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            reason: Exception = error
        except ServerError as error:
            if not isinstance(error.__context__, ValidationError):
                raise  # a value that is out of bounds, by the name of its option
            reason = error
        raise ServerError(f"QVL_GUARD can't be read ({reason}). `qvl serve` sets it itself: unset it.")
