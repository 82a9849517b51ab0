"""Counters that more than one room of the server counts on."""

from __future__ import annotations

from prometheus_client import Counter

from serve.settings.limits import REASONS

__all__ = ["refusals"]

#: Requests refused before the engine saw them, by reason.
refusals = Counter("qvl_refusals", "Requests refused before the engine saw them.", ["reason"])
for _reason in REASONS:
    refusals.labels(_reason)  # a series that exists can be alerted on
