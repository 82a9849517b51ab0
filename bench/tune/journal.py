"""What a tuning has measured so far, on disk: a run that is killed, or whose time is up, goes on from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.tune.config import TuneConfig
from toolkit.files import write_whole

__all__ = ["FP16", "Journal", "Trial"]

#: Name of the 16-bit model among the trials.
FP16 = "fp16"
_SCHEMA = 1


@dataclass(slots=True)
class Trial:
    """What became of a candidate.

    Attributes:
        settings: what it was booted with, as JSON.
        figures: by load: output tokens/s, p50 of TTFT and TPOT in ms, requests.
        failed: why it could not be measured, or not further.
    """

    name: str
    settings: dict[str, Any]
    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: str | None = None

    def missing(self, config: TuneConfig) -> list[int]:
        """Return the loads that are still to be measured."""
        return [] if self.failed else [load for load in config.concurrencies if load not in self.figures]


class Journal:
    """The trials of one tuning, in a file that is rewritten after each step.

    Args:
        path: the file; its directory is made.
        about: what is tuned and how: a file about something else is begun anew.
        fresh: begin anew in any case.
    """

    def __init__(self, path: Path, about: dict[str, Any], *, fresh: bool = False) -> None:
        self.path, self.about = path, about
        self.trials: dict[str, Trial] = {}
        if fresh:
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["schema"] == _SCHEMA and found["about"] == json.loads(json.dumps(about)):
                for each in found["trials"]:
                    figures = {int(load): values for load, values in each["figures"].items()}
                    self.trials[each["name"]] = Trial(each["name"], each["settings"], figures, each["failed"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.trials = {}  # none yet, or a file that is no journal

    @classmethod
    def name(cls, about: dict[str, Any]) -> str:
        """Return a file name that stands for what is tuned and how."""
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return f"{digest[:16]}.json"

    def trial(self, name: str, settings: dict[str, Any]) -> Trial:
        """Return the trial of a candidate, begun anew when its settings are not what they were."""
        known = self.trials.get(name)
        if known is None or known.settings != settings:
            known = self.trials[name] = Trial(name, settings)
        return known

    def save(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"schema": _SCHEMA, "about": self.about, "trials": [asdict(t) for t in self.trials.values()]}
        write_whole(self.path, json.dumps(found, indent=1) + "\n")
