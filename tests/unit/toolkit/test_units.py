"""Three digits and a unit."""

from __future__ import annotations

import pytest

from toolkit.units import human_bytes, human_count


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (7_140_000_000, "6.65 GiB")]
)
def test_human_bytes(size: int, text: str) -> None:
    assert human_bytes(size) == text


@pytest.mark.parametrize(("number", "text"), [(512, "512"), (5_530_000, "5.53 M"), (8_291_375_616, "8.29 B")])
def test_human_count(number: int, text: str) -> None:
    assert human_count(number) == text
