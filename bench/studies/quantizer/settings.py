"""What a run of the quantizer's benchmark was asked for, and how much work that means."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["PARTS", "Settings"]

#: In the order in which they run.
PARTS = ("speed", "full", "wide", "cost", "quality", "devices", "backoff")


@dataclass(frozen=True)
class Settings:
    """Made by the command line, read by the process of each part.

    ``tiny`` puts the embedded model in the place of the real shapes and cuts all numbers, so that a CPU can show that
    everything runs; its figures say nothing.
    """

    out: str
    stock_python: str | None = None
    tokenizer: str | None = None
    layers: int = 3
    tiny: bool = False
    image_size: int = 448

    @property
    def work(self) -> Path:
        """Directory of models and other files that are not results."""
        return Path(self.out) / "work"

    @property
    def samples(self) -> int:
        """Calibration samples."""
        return 8 if self.tiny else 128

    @property
    def tokens(self) -> int:
        """Tokens of a text sample."""
        return 64 if self.tiny else 512

    @property
    def held_out(self) -> int:
        """Text samples that errors are measured on."""
        return 2 if self.tiny else 8

    @property
    def cost_samples(self) -> tuple[int, ...]:
        """Numbers of samples that cost is measured at."""
        return (2, 4, 8) if self.tiny else (16, 32, 64, 128, 256, 512)

    @property
    def per_task(self) -> int:
        """Held-out questions a task."""
        return 2 if self.tiny else 200

    @property
    def chats_per_task(self) -> int:
        """Held-out chats a task that divergence is measured on."""
        return 2 if self.tiny else 500

    def save(self) -> Path:
        """Write the settings into the work directory and return the file."""
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / "settings.json"
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read what :meth:`save` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))
