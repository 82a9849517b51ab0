"""Disk and memory of both systems."""

from __future__ import annotations

from dataclasses import dataclass

from bench.report import words
from bench.report.schema import Report
from bench.report.view.cells import NOTHING
from bench.roles import ROLES

__all__ = ["Size", "sizes"]


@dataclass(frozen=True, slots=True)
class Size:
    """Disk or memory of both systems, the baseline's first.

    Attributes:
        short: what it is called where there is little room; empty: it is left out there.
        within: whether it is a part of the row above.
        always: whether it is shown although it is known of neither.
    """

    name: str
    short: str
    values: list[str]
    within: bool = False
    always: bool = False

    @property
    def known(self) -> bool:
        """Whether it is known of one system at least."""
        return set(self.values) != {NOTHING}


def sizes(report: Report) -> list[Size]:
    """Return every kind of size, those too that are known of neither system."""
    systems = [report.systems[role] for role in ROLES]
    weights = [words.gib(s.disk_weights_bytes) for s in systems]
    return [
        Size("stored as", "stored as", [s.quantization or NOTHING for s in systems], always=True),
        Size("checkpoint on disk", "on disk", [words.gib(s.disk_bytes) for s in systems], always=True),
        Size("its weights", "", weights, within=True),
        Size("server, host memory", "host memory", [words.gib(s.memory.host_bytes) for s in systems], always=True),
        Size("server, GPU memory", "GPU memory", [words.gib(s.memory.gpu_bytes) for s in systems]),
        Size("weights in memory", "weights in memory", [words.gib(s.memory.weights_bytes) for s in systems]),
        Size("KV cache, tokens", "KV cache, tokens", [words.count(s.memory.kv_cache_tokens) for s in systems]),
    ]
