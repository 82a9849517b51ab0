"""Conditions for failing, as `qvl compare --fail-if` takes them. A condition reads

    METRIC[@LOAD] OP CHANGE[UNIT]        accuracy<-1pt   tpot.p50@4>+5%   size_on_disk>0%

METRIC: ``accuracy``, ``accuracy.TASK``, ``ttft|tpot|itl|e2e`` with ``.p50|.p90|.p95|.p99`` (or ``_p50``), one of
`RATES`, `COUNTED` or `DRIFT`, ``joules_per_token``. LOAD: ``4`` in flight, ``2.5/s``, or a load's name; without it a
speed condition is tested under every load both reports have. OP: ``< <= > >=``. UNIT: ``%`` is a relative change
(B - A) / A, ``pt`` a difference in percentage points (shares alone), ``ms`` a difference of a latency.

A condition is judged with the change's 95% interval: ``worse`` when the change meets it and the interval leaves out no
change at all, ``no worse`` when nothing in the interval meets it, else ``can't tell``.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from bench.report.compare.changes import Row
from bench.report.compare.figures import KNOWN, LATENCIES, SPEED, is_share
from bench.report.schema import Judgement, Load
from toolkit.errors import BenchError

__all__ = ["Condition", "Gate", "parse_condition"]

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(
    r"\s*(?P<metric>accuracy\.[^<>@=]*[^<>@=\s]|[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*)\s*(?:@\s*(?P<at>[^<>=@]+?))?\s*(?P<op><=|>=|<|>)\s*"
    r"(?P<change>[+\-−]?\d+(?:\.\d+)?)\s*(?P<unit>%|pt|ms|)\s*"
)


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition for failing, as in the module's grammar."""

    text: str
    metric: str
    at: str | None
    op: str
    change: float
    unit: str

    def met(self, before: float, change: float) -> bool:
        """Whether a change (as in `Change`) from ``before`` (in the metric's own unit) meets it."""
        if self.unit == "ms":
            shown = change * before
        elif self.unit == "%" and is_share(self.metric):
            shown = 100.0 * change / before if before else math.copysign(math.inf, change) if change else 0.0
        else:
            shown = 100.0 * change
        # Decimal fractions are not exact in binary: a change of exactly the limit must not count as past it.
        return OPERATORS[self.op](round(shown, 9), self.change)

    def judge(self, row: Row) -> Judgement:
        """Judge a change with its interval; without one nothing is told but that a change of 0 is none."""
        change = row.change
        if change.low is None or change.high is None:
            return "can't tell"
        if not any(self.met(row.before.value, value) for value in (change.low, change.value, change.high)):
            return "no worse"
        if self.met(row.before.value, change.value) and change.beyond_chance:
            return "worse"
        return "can't tell"


def parse_condition(text: str) -> Condition:
    """Read a condition.

    Raises:
        BenchError: it does not follow the grammar, names an unknown metric, or would fail two equal reports.
    """
    match = _CONDITION.fullmatch(text)
    if not match:
        raise BenchError(
            f"--fail-if {text!r}: write METRIC OP CHANGE with OP one of < <= > >= and CHANGE ending in %, pt or ms, "
            "e.g. 'accuracy<-1pt' or 'tpot.p50@4>+5%'"
        )
    metric, unit = match["metric"], match["unit"]
    if not metric.startswith("accuracy."):
        metric = metric.lower().replace(".", "_")  # ttft.p50 is ttft_p50
    share = is_share(metric)
    if not share and metric not in KNOWN:
        raise BenchError(f"--fail-if {text!r}: unknown metric {metric!r}; choose one of {', '.join(KNOWN)}")
    if share and unit not in ("%", "pt"):
        raise BenchError(f"--fail-if {text!r}: {metric} changes by % (relative) or pt (percentage points); say which")
    if not share and (unit not in ("%", "ms") or (unit == "ms" and metric not in LATENCIES)):
        fitting = "% or ms" if metric in LATENCIES else "%"
        raise BenchError(f"--fail-if {text!r}: a change of {metric} is given in {fitting}")
    at = _load(match["at"]) if match["at"] else None
    if at is not None and metric not in SPEED:
        raise BenchError(f"--fail-if {text!r}: {metric} is not measured under a load; drop @{match['at']}")
    change = float(match["change"].replace("−", "-"))
    if OPERATORS[match["op"]](0.0, change):
        raise BenchError(
            f"--fail-if {text!r}: two equal reports would fail this; turn the sign or the comparison round"
        )
    return Condition(text.strip(), metric, at, match["op"], change, unit)


def _load(text: str) -> str:
    """The name of a load: ``4`` is ``4 in flight``, ``2.5/s`` is ``2.5 requests/s``."""
    text = text.strip()
    if text.isdecimal():
        return Load.in_flight(int(text)).name
    rate = re.fullmatch(r"(\d+(?:\.\d+)?)\s*/s", text)
    return Load.at_rate(float(rate[1]), "poisson").name if rate else text


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition, judged on one figure."""

    condition: Condition
    row: Row
    judgement: Judgement
