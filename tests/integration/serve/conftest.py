"""Fixtures of both tiers."""

from tests.support.serve import cache, start

__all__ = ["cache", "start"]
