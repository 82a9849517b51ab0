"""Looked at in processes of their own: torchvision is imported once a process."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
def test_torchvision_imports_afterwards_and_its_transforms_work() -> None:
    code = """
from toolkit.compat import patch_torchvision
first, second = patch_torchvision(), patch_torchvision()
import torch, torchvision
from torchvision.transforms.v2 import functional
resized = functional.resize(torch.zeros(3, 28, 28), [14, 14], interpolation=functional.InterpolationMode.BICUBIC)
print(first == second, tuple(resized.shape))
"""
    assert run(code) == "True (3, 14, 14)\n"


@pytest.mark.slow
def test_a_working_torchvision_is_left_alone() -> None:
    """Where its operators load, no schema is defined; where they do not, exactly those two are missing before."""
    code = """
import torch
from toolkit import compat
patched = compat.patch_torchvision()
print(patched == bool(compat._libraries), hasattr(torch.ops.torchvision, "nms"))
"""
    assert run(code) == "True True\n"


def test_no_torchvision_at_all() -> None:
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find(name, *rest)
from toolkit.compat import patch_torchvision
print(patch_torchvision(), "torch" in sys.modules)
"""
    assert run(code) == "False False\n"
