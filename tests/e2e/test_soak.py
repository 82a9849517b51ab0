"""The soak in three minutes instead of thirty: the same requests, the same accounts."""

from __future__ import annotations

import asyncio

import pytest

from bench.chaos.settings import SoakSettings
from bench.chaos.soak import MIX, soak
from tests.e2e.conftest import Public

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.release]


def test_three_minutes_of_everything(public: Public) -> None:
    settings = SoakSettings(api_key=public.keys[1], minutes=3, pid=public.pid, pause=0.1)
    report = asyncio.run(soak(public.url, settings))
    assert set(report.sent) == set(MIX)
    assert sum(report.sent.values()) > 50
    assert len(report.memory) > 50
    assert not report.problems()
