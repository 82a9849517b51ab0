"""What a share of the layers says while it is searched, in this process or from another."""

from __future__ import annotations

from dataclasses import dataclass

from toolkit.errors import QvlError

__all__ = ["Captured", "Ended", "Event", "Failed", "LayerDone", "Note"]


@dataclass(frozen=True)
class Captured:
    """So many samples are through the vision tower."""

    samples: int


@dataclass(frozen=True)
class Note:
    """Something for the user to read."""

    text: str


@dataclass(frozen=True)
class LayerDone:
    """A layer, or a stage of the vision tower, is searched and on its way to the disk.

    ``layer``: its number in the journal; ``error``: its output's; ``seconds`` by step; ``peak``: memory in bytes;
    ``name``: as it is said to users; "": layer so and so.
    """

    layer: int
    error: float
    seconds: dict[str, float]
    peak: int
    name: str = ""


@dataclass(frozen=True)
class Ended:
    """The share is done: the device in words, seconds by step, peaks in bytes."""

    device: str
    seconds: dict[str, float]
    peak_device_bytes: int
    peak_host_bytes: int


@dataclass(frozen=True)
class Failed:
    """The share was given up."""

    error: QvlError


Event = Captured | Note | LayerDone | Ended | Failed
