"""How often, and how many at once, one client may ask: a token bucket and a count for each key or address."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve.http.errors import Refusal

__all__ = ["Clients"]

#: Clients remembered. The one that was idle longest is forgotten first, and gets a full bucket when it comes back.
_MOST_CLIENTS = 10_000
#: Seconds' worth of requests that may come at once.
_BURST_SECONDS = 10.0


@dataclass(slots=True)
class _Client:
    tokens: float
    at: float
    running: int = 0


class Clients:
    """The clients of one server process; each process of a server with several counts for itself."""

    def __init__(self, rate_per_minute: float, concurrency: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate_per_minute / 60
        self._burst = max(1.0, self._rate * _BURST_SECONDS)
        self._concurrency = concurrency
        self._clock = clock
        self._clients: OrderedDict[str, _Client] = OrderedDict()

    def enter(self, name: str) -> None:
        """Count a request in; `leave` must follow. Raises Refusal, which counts nothing, when there are too many."""
        now = self._clock()
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(self._burst, now)
            self._forget_idle()
        else:
            self._clients.move_to_end(name)
        if client.running >= self._concurrency:
            raise _wait("concurrency", f"{client.running} requests are under way already. Wait for one to end.", 1)
        if self._rate:
            client.tokens = min(self._burst, client.tokens + (now - client.at) * self._rate)
            client.at = now
            if client.tokens < 1:
                wait = math.ceil((1 - client.tokens) / self._rate)
                raise _wait("rate", f"At most {self._rate * 60:g} requests a minute: try again in {wait} s.", wait)
            client.tokens -= 1
        client.running += 1

    def leave(self, name: str) -> None:
        """Count a request out."""
        self._clients[name].running -= 1

    def running(self) -> int:
        """Return how many requests are under way."""
        return sum(client.running for client in self._clients.values())

    def _forget_idle(self) -> None:
        for name in list(self._clients)[: max(0, len(self._clients) - _MOST_CLIENTS)]:
            if not self._clients[name].running:
                del self._clients[name]


def _wait(reason: str, message: str, seconds: int) -> Refusal:
    return Refusal(429, reason, message, headers=[(b"retry-after", str(seconds).encode())])
