"""What all requests of a server share: pixels that are decoded at one time, and grammars that are compiled."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from serve.guard.upload import ClientGone
from serve.http.errors import Refusal

__all__ = ["Grammars", "Pixels", "pixels_for"]

#: Bytes that a pixel takes from its decoding until the model's processor is done with it: Pillow holds 4, converts to
#: RGB in another 4, and the processor copies 3. Measured: 768 Mpixels under way together took 4 GB.
_BYTES_A_PIXEL = 11
#: Share of the memory that pixels may take. Weights, KV cache and everything else have the rest.
_SHARE = 0.25

#: States of a grammar (`serve.guard.schema`) that need no turn: it is compiled before anybody notices.
_FREE_STATES = 32
#: Seconds that a state may take, for grammars whose client has left: nobody says when they are compiled.
_STATE_SECONDS = 0.002
#: Requests of one client that wait for their turn.
_MOST_WAITING = 32
#: Schemas remembered as compiled: about what the compiler's own cache holds.
_MOST_KNOWN = 1000


def pixels_for(memory: int) -> int:
    """Return how many pixels may be decoded at one time in so many bytes of memory."""
    return int(memory * _SHARE / _BYTES_A_PIXEL)


class Pixels:
    """The pixels that are decoded for requests under way, from their admission until their first token.

    Attributes:
        held: now.
        most: that may be held.
    """

    def __init__(self, most: int) -> None:
        self.held, self.most = 0, most

    def enter(self, pixels: int) -> Callable[[], None]:
        """Count a request's pixels in; returns what counts them out, once. Raises Refusal.

        Whatever its size, a request is let in when nothing else is held: else it could never be.
        """
        if pixels and self.held and self.held + pixels > self.most:
            message = "The images of other requests are being decoded. Try again in a moment, or send smaller images."
            raise Refusal(429, "image_memory", message, "messages", headers=[(b"retry-after", b"1")])
        self.held += pixels
        left = False

        def leave() -> None:
            nonlocal left
            if not left:
                left = True
                self.held -= pixels

        return leave


@dataclass(slots=True)
class _Turns:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0


class Grammars:
    """Turns: of each client one new schema at a time is compiled. What is compiled already needs none."""

    def __init__(self) -> None:
        self._turns: dict[str, _Turns] = {}
        self._known: OrderedDict[bytes, None] = OrderedDict()

    async def enter(
        self, name: str, schemas: bytes, states: float, leaves: Callable[[], Awaitable[object]]
    ) -> Callable[[bool], None]:
        """Wait for a turn; returns what ends it, to be called with whether an answer has begun.

        A turn that ends without an answer lasts on for as long as its grammar may still be compiled.

        Args:
            name: the client's.
            schemas: a digest of the request's schemas; empty for none.
            states: that they cost.
            leaves: returns when the client has left, or its time is up; then there is no turn to wait for.

        Raises:
            Refusal: too many of this client's requests wait.
            ClientGone: it left.
        """
        if not schemas or states <= _FREE_STATES or schemas in self._known:
            return lambda begun: None
        turns = self._turns.setdefault(name, _Turns())
        if turns.waiting >= _MOST_WAITING:
            message = "Too many JSON schemas of yours wait to be compiled. Wait for an answer, or send the same again."
            raise Refusal(429, "concurrency", message, headers=[(b"retry-after", b"1")])
        turns.waiting += 1
        try:
            await self._turn(turns, leaves)
        finally:
            turns.waiting -= 1
            self._forget(name, turns)
        if schemas in self._known:  # the one before it was the same
            self._end(name, turns)
            return lambda begun: None
        return self._ending(name, turns, schemas, states)

    @staticmethod
    async def _turn(turns: _Turns, leaves: Callable[[], Awaitable[object]]) -> None:
        turn = asyncio.ensure_future(turns.lock.acquire())
        gone = asyncio.ensure_future(leaves())
        kept = False
        try:
            await asyncio.wait((turn, gone), return_when=asyncio.FIRST_COMPLETED)
            kept = turn.done() and not gone.done()
        finally:
            for task in (turn, gone):
                task.cancel()
            await asyncio.gather(turn, gone, return_exceptions=True)
            if not kept and not turn.cancelled():
                turns.lock.release()
        if not kept:
            raise ClientGone

    def _ending(self, name: str, turns: _Turns, schemas: bytes, states: float) -> Callable[[bool], None]:
        ended = False

        def end(begun: bool) -> None:
            nonlocal ended
            if ended:
                return
            ended = True
            if begun:
                self._known[schemas] = None
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
                self._end(name, turns)
            else:
                wait = math.ceil(states) * _STATE_SECONDS
                asyncio.get_running_loop().call_later(wait, self._end, name, turns)

        return end

    def _end(self, name: str, turns: _Turns) -> None:
        turns.lock.release()
        self._forget(name, turns)

    def _forget(self, name: str, turns: _Turns) -> None:
        if not turns.waiting and not turns.lock.locked():
            self._turns.pop(name, None)
