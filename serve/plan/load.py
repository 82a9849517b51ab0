"""What a server is to take: what a plan for a card starts from."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import model_validator

from serve.settings.config import DEFAULT_GPU_SHARE
from toolkit.errors import QvlError, ResourceError
from toolkit.options import Option, Settings

__all__ = ["Load"]


class Load(Settings):
    """What a server is to take. None: as much as fits, or vLLM's own default.

    Raises ResourceError for a share that is none.
    """

    error: ClassVar[type[QvlError]] = ResourceError

    context: Annotated[int, Option("Longest sequence in tokens, images included.", least=1)] = 16384
    #: The processor scales larger ones down.
    image_pixels: Annotated[int | None, Option("Most pixels of an image (the processor's own bound).", least=784)] = (
        None
    )
    max_num_seqs: Annotated[int | None, Option("Sequences computed together (vLLM's own).", least=1)] = None
    max_num_batched_tokens: int | None = None
    share: Annotated[float, Option("Share of the card that vLLM may take.", name="--gpu-memory-utilization")] = (
        DEFAULT_GPU_SHARE
    )
    tp: Annotated[int, Option("Cards of that size that split the weights.", least=1)] = 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not 0 < self.share <= 1:
            raise ResourceError(f"--gpu-memory-utilization {self.share}: give a share above 0, up to 1.")
        return self
