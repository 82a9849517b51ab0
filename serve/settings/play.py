"""The settings of the page at /play."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import httpx

from toolkit.errors import ServerError

__all__ = ["PlayOptions"]


@dataclass(frozen=True, kw_only=True)
class PlayOptions:
    """The page's settings. Raises ServerError, naming the option, for a value that can't be."""

    #: Address of the server to compare with, such as http://127.0.0.1:8001. None: the page shows one server.
    beside: str | None = None
    #: Pixels of an image that become one token of the model: the page scales images to what it has room for.
    token_pixels: int = 28 * 28

    def __post_init__(self) -> None:
        if self.beside is None:
            return
        try:
            url = httpx.URL(self.beside)
        except httpx.InvalidURL:
            url = httpx.URL()
        if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query or url.fragment:
            raise ServerError(f"--play-beside {self.beside}: give an address such as http://127.0.0.1:8001.")
        object.__setattr__(self, "beside", str(url).rstrip("/").removesuffix("/v1"))

    def dumps(self) -> str:
        """Return the settings as JSON, for the environment variable QVL_PLAY of the server's process."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> PlayOptions:
        """Return the settings that `dumps` wrote. Raises ServerError."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ServerError(f"QVL_PLAY can't be read ({error}). `qvl serve` sets it itself: unset it.") from None
