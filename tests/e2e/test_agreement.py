"""Ours and `vllm bench serve` against one server. The band is wide: the model is tiny, so that the two clients, which
share two cores with the server, are a good part of what they measure. docs/compare.md tells the figures."""

from __future__ import annotations

import asyncio

import pytest

from bench.load.endpoint import discover
from bench.studies.agreement import METRICS, Load, measure, table
from tests.conftest import TOLD
from tests.e2e.conftest import Served
from toolkit.paths import demo_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.release]


def test_both_tools_measure_the_same(served: Served, request: pytest.FixtureRequest) -> None:
    endpoint = asyncio.run(discover(served("demo").url))
    loads = [Load(1, 12, None, 32, 32), Load(2, 12, (224, 224), 32, 32)]
    found = measure(endpoint, str(demo_checkpoint()), loads, rounds=2)
    request.config.stash[TOLD] += table(found).splitlines()
    for one in found:
        for metric in METRICS:
            # As far apart as the rounds of one tool among themselves, and half as much again for two busy cores.
            band = 1.5 + one.spread(metric)
            assert 1 / band < one.ratio(metric) < band, (one.load, metric, table(found))
