"""The settings of /ready: how often the server is asked, how long an answer may take, how long it drains."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

__all__ = ["ReadySettings"]


@dataclass(frozen=True, kw_only=True)
class ReadySettings:
    """The settings of the probe and the drain; times in seconds."""

    #: The name that the model is served under.
    model: str
    #: Longest time without proof that the engine answers, after which it is asked.
    every: float = 15.0
    #: Within this an image question must be answered.
    limit: float = 20.0
    #: The same for the first one, which may compile and warm up.
    first_limit: float = 600.0
    #: How long requests under way may take to finish after SIGTERM.
    drain: float = 30.0
    #: When the start was asked for, on the machine's monotonic clock.
    began: float | None = None
    restarts: int = 0

    def dumps(self) -> str:
        """Return the settings as JSON, for the environment of the server's process."""
        return json.dumps(asdict(self))
