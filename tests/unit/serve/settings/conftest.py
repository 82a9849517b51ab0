"""Two checkpoints that settings are held against."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.paths import demo_checkpoint


@pytest.fixture
def demo() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


@pytest.fixture
def awq(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(tiny.write(tmp_path / "tiny-awq", version="gemm"))
