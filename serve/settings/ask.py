"""What `qvl ask` asks with."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from serve.settings.environment import API_KEY
from toolkit.errors import QvlError, ServerError
from toolkit.options import Option, Settings

__all__ = ["AskConfig"]


class AskConfig(Settings):
    """Whom `qvl ask` asks, about what, and how long the answer may be."""

    error: ClassVar[type[QvlError]] = ServerError

    images: Annotated[
        tuple[str, ...], Option("Image to ask about, a file or URL; repeat for several.", name="--image")
    ] = ()
    url: Annotated[
        str | None, Option("The server (the one that `qvl serve` has started, else http://127.0.0.1:8000).")
    ] = None
    api_key: Annotated[
        str | None,
        Option("The server's key, if it wants one.", envvar=API_KEY, instead=f"the environment variable {API_KEY}"),
    ] = Field(default=None, repr=False)
    model: Annotated[str | None, Option("Model to ask (the first that the server lists).")] = None
    max_tokens: Annotated[int, Option("Longest answer.", least=1)] = 256
    temperature: Annotated[float, Option("0 takes the likeliest token each time.", least=0)] = 0.0
