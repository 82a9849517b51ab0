"""How the work of a product is cut up: measured for the shapes of known models, taken from the nearest one for others.

`plans.json` is written by ``python -m bench.studies kernels``: per group size and rows, ``"N,K"`` -> a plan's
numbers in the order of its fields, and the microseconds that were measured.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

__all__ = ["MAX_ROWS", "ROWS", "Plan", "candidates", "plan_for"]

#: Rows up to which a plan is made: a kernel each.
ROWS = (2, 8, 16)
MAX_ROWS = ROWS[-1]
#: Shared memory of an SM and what a CTA takes of it besides its own, in bytes; SMs of an H100 and H200.
_SHARED, _RESERVED, SMS = 227 * 1024, 1024, 132
_TABLE = Path(__file__).with_name("plans.json")


@dataclass(frozen=True)
class Plan:
    """The numbers that a kernel is compiled with; see w4a16.cu."""

    warps: int
    split: int
    blocks: int
    ahead: int
    unit: int

    def clusters(self, columns: int, sms: int) -> int:
        """Return how many clusters are launched for N columns."""
        return max(1, min(columns // 64, sms * self.blocks // self.split))

    def one_round(self, columns: int, sms: int) -> bool:
        """Whether each cluster has one column tile at most."""
        return self.clusters(columns, sms) == columns // 64

    def shared(self, columns: int, inputs: int, rows: int, sms: int) -> int:
        """Return the bytes of shared memory that a CTA needs, as w4a16.cu lays it out."""
        blocks = -(-rows // 8)
        cells, alias = 64 * 8 * blocks, self.one_round(columns, sms)
        inbox = 4 * (1 if alias else 2) * (cells + 4 * self.split) if self.split > 1 else 0
        share = -(-(inputs // (16 * self.unit)) // self.split) * 16 * self.unit
        x, sums = 8 * blocks * (share + 8) * 2, 4 * self.warps * cells
        return inbox + (max(x, sums) if alias else x + sums)

    def fits(self, columns: int, inputs: int, rows: int, sms: int) -> bool:
        """Whether the plan works for a product of this shape."""
        return (
            columns % 64 == 0
            and inputs % (16 * self.unit) == 0
            and self.split <= inputs // (16 * self.unit)
            and self.ahead <= self.unit
            and (self.shared(columns, inputs, rows, sms) + _RESERVED) <= _SHARED
        )

    def options(self, columns: int, rows: int, group_size: int, half: bool, sms: int) -> list[str]:
        """Return the definitions that make the kernel of w4a16.cu."""
        named = {
            "WARPS": self.warps,
            "SPLIT": self.split,
            "BLOCKS": self.blocks,
            "RD": self.ahead,
            "UT": self.unit,
            "MT": -(-rows // 8),
            "GROUP_TILES": group_size // 16,
            "ALIAS": int(self.one_round(columns, sms)),
            "HALF": int(half),
        }
        return [f"-D{name}={value}" for name, value in named.items()]


def plan_for(columns: int, inputs: int, group_size: int, rows: int, sms: int = SMS) -> Plan | None:
    """Return the plan for a product of ``rows`` (one of `ROWS`) with [inputs, columns] weights; None: there is none.

    The measured one, else that of the nearest shape that works for this one too.
    """
    table = _read().get(f"{group_size}/{rows}", {})
    ranked = sorted(table, key=lambda shape: _distance(shape, (columns, inputs)))
    return next((table[shape] for shape in ranked if table[shape].fits(columns, inputs, rows, sms)), None)


def _distance(a: tuple[int, int], b: tuple[int, int]) -> float:
    return abs(math.log(a[0] / b[0])) + abs(math.log(a[1] / b[1]))


@functools.cache
def _read() -> dict[str, dict[tuple[int, int], Plan]]:
    found: dict[str, dict[tuple[int, int], Plan]] = {}
    for kind, shapes in json.loads(_TABLE.read_text())["plans"].items():
        found[kind] = {}
        for shape, numbers in shapes.items():
            columns, inputs = map(int, shape.split(","))
            found[kind][columns, inputs] = Plan(*numbers[: len(astuple(Plan(1, 1, 1, 1, 1)))])
    return found


def candidates(columns: int, inputs: int, rows: int, sms: int = SMS) -> Iterator[Plan]:
    """Yield the plans that are worth measuring for a shape: those that keep most of the card busy."""
    large = columns * inputs > 30e6
    most = 20 if rows <= 8 else 16
    for warps, split, blocks, ahead, unit in product(
        (2, 3, 4, 5, 6, 7, 8, 10, 12, 14), range(1, 9), range(1, 7), (4, 8), (4, 8)
    ):
        plan = Plan(warps, split, blocks, ahead, unit)
        units, tiles = inputs // (16 * unit), columns // 64
        if not plan.fits(columns, inputs, rows, sms) or warps * split > units or warps * blocks > most:
            continue
        if (plan.shared(columns, inputs, rows, sms) + _RESERVED) * blocks > _SHARED or tiles * split < 0.68 * sms:
            continue
        if unit == 4 and (large or ahead == 8):
            continue
        if large and (warps < 4 or warps * blocks < (10 if rows <= 8 else 6)):
            continue
        clusters = plan.clusters(columns, sms)
        if not large and blocks > 1 and clusters * split <= sms * (blocks - 1):
            continue
        rounds, turns = math.ceil(tiles / clusters), math.ceil(math.ceil(units / split) / warps)
        if tiles * units / (clusters * rounds * split * warps * turns) >= (0.8 if large and rows <= 8 else 0.6):
            yield plan
