"""What a server writes down of the requests that it gets, so that they can be replayed. By default nothing."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ValidationInfo

from toolkit.errors import QvlError, ServerError
from toolkit.options import Option, Settings

__all__ = ["Recording"]

_operation = functools.partial(Option, panel="Recording")
MIB = 2**20


def _one_of(*words: str) -> Any:
    def check(value: Any, info: ValidationInfo) -> Any:
        if value not in words:
            raise ServerError(f"{Recording.option(str(info.field_name))} {value}: give {' or '.join(words)}.")
        return value

    return BeforeValidator(check)


class Recording(Settings):
    """Attributes:
    record: the directory that the trace is kept in; None: nothing is written down.
    record_texts: whether texts are kept, or their length and a hash with a key that nobody knows.
    record_images: whether images are kept, or their size and such a hash.
    record_limit: MiB that the directory may take; beyond, nothing more is written down.
    """

    error: ClassVar[type[QvlError]] = ServerError

    record: Annotated[
        Path | None,
        _operation("Write requests down for qvl bench --replay: when each came, its lengths, hashes.", metavar="DIR"),
    ] = None
    record_texts: Annotated[
        Literal["hashed", "kept"], _one_of("hashed", "kept"), _operation("hashed, or kept as they are.")
    ] = "hashed"
    record_images: Annotated[
        Literal["size", "kept"], _one_of("size", "kept"), _operation("size and a hash, or kept as files.")
    ] = "size"
    record_limit: Annotated[int, _operation("MiB that the directory may take; then recording ends.", least=1)] = 1024

    def check(self) -> str | None:
        """Make the directory; return what an operator should know, None where nothing is written down.

        Raises:
            ServerError: it can't be written to.
        """
        if self.record is None:
            return None
        try:
            self.record.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe = self.record / ".probe"
            probe.touch(mode=0o600)
            probe.unlink()
        except OSError as error:
            raise ServerError(f"--record {self.record} can't be written to ({error.strerror}).") from None
        texts = "their texts as they are" if self.record_texts == "kept" else "hashes and lengths of their texts"
        images = "their images as they are" if self.record_images == "kept" else "hashes and sizes of their images"
        return f"requests are recorded in {self.record}: when they came, {texts}, {images}"

    def dumps(self) -> str:
        """Return the settings as JSON, for the environment variable QVL_RECORD of the server's process."""
        return json.dumps(self.model_dump(mode="json") | {"record": str(Path(str(self.record)).absolute())})

    @classmethod
    def loads(cls, text: str) -> Self:
        """Return the settings that `dumps` wrote. Raises ServerError."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ServerError(f"QVL_RECORD can't be read ({error}). `qvl serve` sets it itself: unset it.") from None
