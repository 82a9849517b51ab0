"""Requests for speed runs: every image and prompt is new to the server, so that no cache answers for the model.

What requests share they share on purpose: a beginning that all prompts have, the earlier turns of a chat. All are made
before the clock starts.
"""

from __future__ import annotations

import base64
import hashlib
import io
import random
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from PIL import Image

from bench.load.client import ChatRequest
from bench.load.workload import ImageSize, Lengths, written
from toolkit.errors import BenchError

__all__ = ["KEY_WORDS", "Inputs", "Made", "SpeedInputs", "image_of", "stamped", "words_of"]

#: Each is one token in Qwen's vocabulary, with the space before it and without. 256 of them: one byte picks one.
WORDS = """
about above after again against air all along also always among animal another answer any area around ask back ball
base because bed been before being below best better between big bird black blue board boat body book both bottom box
boy bring build building built but call came can car care carry center change check child children city class clear
close cold color come common complete could country course cover cross cut dark day deep did different distance does
dog done door down draw drive dry during each early earth east easy eat end even ever every example eye face fact fall
family far farm fast father feel few field figure fill final find fine fire first fish five floor fly follow food foot
for force form found four free friend from front full game general get girl give glass gold good got government great
green ground group grow had half hand hard has have head hear heard heart heat heavy help her here high hill him his
hold home horse hot hour house how idea important inch inside into its job just keep kind king know land language
large last late later learn leave left less let letter life light like line list listen little live long look lost
love low machine made main make man many map mark may mean measure men might mile mind minute miss money moon more
most mother move much music must name near need never new next night north note nothing notice number off often old
once one
""".split()  # noqa: SIM905  # fits on a screen
#: The first words of a prompt say which it is, 8 bits each, so that no two prompts share a prefix of this length.
KEY_WORDS = 8


@dataclass(frozen=True, slots=True)
class Made:
    """A request, and what is known of it.

    Attributes:
        shape: what decides about its cost beside lengths: ``text``, the size of its image, or ``3 images``.
        sizes: of all images in it, earlier turns' too: width, height in pixels.
        follows: whether it is a later turn of the chat before it.
    """

    request: ChatRequest
    shape: str
    sizes: tuple[tuple[int, int], ...] = ()
    follows: bool = False


class Inputs(Protocol):
    """Where the requests of a run are from."""

    @property
    def turns(self) -> int:
        """Most turns of a chat that are sent one after the other."""

    def made(self, block: str, count: int, *, chats: bool = False) -> list[Made]:
        """Return the first ``count`` requests of ``block``; equal arguments give equal ones, and no block has an input
        that another has, but for what is shared on purpose.

        Args:
            chats: turns of a chat come one after the other, each a request; else a chat is one request.
        """

    def warm_up(self, block: str = "warm-up") -> list[Made]:
        """Return requests that show a server every shape there is, and share no input with any other block."""


@dataclass(frozen=True, slots=True)
class SpeedInputs:
    """Makes the requests of a run.

    Attributes:
        nonce: different in every run: a server that outlives one run may have cached its images.
        sizes: images go through them in turn.
        output_tokens: exact length of each answer.
        prompt_tokens: words of each prompt, at least `KEY_WORDS`; each is a token of Qwen's. The chat template's own
            tokens and the images' come on top: the server's usage has them all.
        images: images of each request; where ``sizes`` has None, one less. Of a chat they come with its first turn.
        turns: of each chat. A later turn has the earlier ones and their answers before it; the answers are made up, of
            the length asked for, so that two systems get the same.
        shared_prefix: words of a system's message that is the same in all requests of the run.
    """

    nonce: str
    sizes: tuple[ImageSize, ...]
    output_tokens: int | Lengths
    prompt_tokens: Lengths = Lengths.fixed(16)  # noqa: RUF009  # frozen
    images: Lengths = Lengths.fixed(1)  # noqa: RUF009
    turns: int = 1
    shared_prefix: int = 0

    def __post_init__(self) -> None:
        if self.prompt_tokens.low < KEY_WORDS:
            raise BenchError(
                f"prompts of {self.prompt_tokens} tokens: must have at least {KEY_WORDS}, or two could be equal"
            )

    def request(self, block: str, index: int) -> ChatRequest:
        """Return request ``index`` of ``block``; equal arguments give equal bytes, any other argument other bytes.

        Blocks have disjoint inputs, so that a warm-up block warms no input of a measured one.
        """
        first, turn = index - index % self.turns, index % self.turns
        asked = [self._turn(block, first + earlier, images=earlier == 0) for earlier in range(turn + 1)]
        before = [*self._system(), *(message for each in asked[:-1] for message in self._said(each))]
        return replace(asked[-1], before=tuple(before))

    def made(self, block: str, count: int, *, chats: bool = False) -> list[Made]:
        """See `Inputs.made`. Chats of several turns are always sent turn by turn."""
        return [
            Made(self.request(block, index), self.shape(block, index), self._shown(block, index), self.follows(index))
            for index in range(count)
        ]

    def bodies(self, block: str, count: int, model: str, *, count_chunks: bool = False) -> list[bytes]:
        """Return the encoded bodies of the first ``count`` requests of ``block``; with ``count_chunks`` they ask the
        server to count tokens in every chunk."""
        return [self.request(block, index).body(model, count_chunks=count_chunks) for index in range(count)]

    def follows(self, index: int) -> bool:
        """Return whether request ``index`` is a later turn of the chat before it."""
        return index % self.turns > 0

    def shape(self, block: str, index: int) -> str:
        """Return what decides about the cost of a request beside lengths: ``text``, the size of its image, or ``3
        images``; of a chat's turns which one it is."""
        if self.turns > 1:
            return f"turn {index % self.turns + 1}"
        shown = self._shown(block, index)
        return written(shown[0] if shown else None) if len(shown) < 2 else f"{len(shown)} images"

    def _shown(self, block: str, index: int) -> tuple[tuple[int, int], ...]:
        """The sizes of the images in a request."""
        first = index - index % self.turns
        count = self.images.at(_quantile(self._digest(block, first), 2))
        turns = [self.sizes[(first // self.turns + number) % len(self.sizes)] for number in range(count)]
        return tuple(size for size in turns if size is not None)

    def warm_up(self, block: str = "warm-up") -> list[Made]:
        """Return requests that show a server every image size in every number of images, with the longest prompt, and
        share no input with any other block; of chats a last turn too."""
        counts = range(self.images.low, self.images.high + 1)
        found = []
        for index, (count, size) in enumerate((count, size) for count in counts for size in range(len(self.sizes))):
            made = self._make(self._digest(f"{block}/shapes", index), size, count, self.prompt_tokens.high)
            turns = [self.sizes[(size + number) % len(self.sizes)] for number in range(count)]
            shown = tuple(each for each in turns if each is not None)
            shape = written(shown[0] if shown else None) if len(shown) < 2 else f"{len(shown)} images"
            found.append(Made(replace(made, before=tuple(self._system())), shape, shown))
        if self.turns > 1:
            found.append(self.made(f"{block}/chat", self.turns)[-1])
        return found

    def _turn(self, block: str, index: int, *, images: bool) -> ChatRequest:
        digest = self._digest(block, index)
        prompt, count = _quantile(digest, 1), self.images.at(_quantile(digest, 2)) if images else 0
        return self._make(digest, index // self.turns, count, self.prompt_tokens.at(prompt))

    def _system(self) -> list[dict[str, Any]]:
        """The message that all requests of the run begin with."""
        if not self.shared_prefix:
            return []
        return [{"role": "system", "content": words_of(self._digest("shared prefix", 0), self.shared_prefix)}]

    def _said(self, asked: ChatRequest) -> list[dict[str, Any]]:
        """An earlier turn, and an answer to it of the length that it asked for."""
        answer = words_of(hashlib.sha256(asked.text.encode()).digest(), asked.max_tokens)
        return [*asked.messages(), {"role": "assistant", "content": answer}]

    def _digest(self, block: str, index: int) -> bytes:
        return hashlib.sha256(f"{self.nonce}/{block}/{index}".encode()).digest()

    def _make(self, digest: bytes, turn: int, count: int, words: int) -> ChatRequest:
        """Return the request that ``digest`` stands for; its images' sizes start with number ``turn``."""
        turns = [self.sizes[(turn + number) % len(self.sizes)] for number in range(count)]
        images = tuple(image_of(digest, number, size) for number, size in enumerate(turns) if size is not None)
        lengths = self.output_tokens
        length = lengths if isinstance(lengths, int) else lengths.at(_quantile(digest, 3))
        return ChatRequest(words_of(digest, words), images, length, fixed_length=True)


def _quantile(digest: bytes, word: int) -> float:
    """Return a number in [0, 1) from the digest's 64-bit word ``word``."""
    return (int.from_bytes(digest[8 * word : 8 * word + 8], "big") >> 11) / 2**53


def words_of(digest: bytes, words: int) -> str:
    """Return so many words, each a token; those that tell digests apart come first, because a prefix cache matches from
    the left."""
    rest = random.Random(digest).choices(WORDS, k=max(0, words - KEY_WORDS))
    return " ".join([*(WORDS[byte] for byte in digest[: min(words, KEY_WORDS)]), *rest])


def image_of(digest: bytes, number: int, size: tuple[int, int]) -> str:
    """Return a data URL of a JPEG like no other: its size's noise with 64 bits of the key stamped into a corner.

    What an image shows does not change its cost; its size and novelty do. A server may know images by their pixels,
    so the stamp is made of those, in 3 x 3 squares of black and white that JPEG keeps apart.
    """
    image = stamped(_noise(size), hashlib.sha256(digest + number.to_bytes(2, "big")).digest())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def stamped(image: Image.Image, digest: bytes) -> Image.Image:
    """Return a copy with 64 bits of ``digest`` in a corner: other pixels for another digest, JPEG or not."""
    key = np.frombuffer(digest[:8], np.uint8)
    stamp = Image.fromarray(np.kron(np.unpackbits(key).reshape(8, 8), np.full((3, 3), 255, np.uint8)))
    copy = image.copy()
    copy.paste(stamp, (0, 0))
    return copy


@lru_cache(maxsize=16)
def _noise(size: tuple[int, int]) -> Image.Image:
    """Return smooth colour noise, about as many bytes a pixel in JPEG as a photograph."""
    width, height = size
    coarse = np.random.default_rng(0).integers(0, 256, (max(2, height // 14), max(2, width // 14), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
