"""Looked at in processes of their own: torchvision is imported once a process."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
def test_torchvision_imports_afterwards_and_one_that_works_is_left_alone() -> None:
    """Where its operators load, no schema is defined; where they do not, exactly those two are missing before."""
    code = """
import torch
from toolkit import compat
first = compat.patch_torchvision()
print(first == bool(compat._libraries), hasattr(torch.ops.torchvision, "nms"))
second = compat.patch_torchvision()
import torchvision
from torchvision.transforms.v2 import functional
resized = functional.resize(torch.zeros(3, 28, 28), [14, 14], interpolation=functional.InterpolationMode.BICUBIC)
print(first == second, tuple(resized.shape))
"""
    assert run(code) == "True True\nTrue (3, 14, 14)\n"


def test_no_torchvision_at_all() -> None:
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find(name, *rest)
from toolkit.compat import patch_torchvision
print(patch_torchvision(), "torch" in sys.modules)
"""
    assert run(code) == "False False\n"


@pytest.mark.parametrize(
    ("torch", "torchaudio", "hidden"),
    [("2.13.0+cpu", "2.11.0", True), ("2.13.0+cpu", "2.11.0+cpu", False), ("2.13.0", "2.11.0", False)],
)
def test_cuda_builds_that_nothing_needs_are_hidden_on_a_cpu(torch: str, torchaudio: str, hidden: bool) -> None:
    code = f"""
import importlib.metadata, importlib.util, sys
versions = {{"torch": {torch!r}, "torchaudio": {torchaudio!r}}}
def version(name):
    if name not in versions:
        raise importlib.metadata.PackageNotFoundError(name)
    return versions[name]
importlib.metadata.version = version
from toolkit.compat import hide_unusable
print(hide_unusable(), hide_unusable(), "torchaudio" in sys.modules, "torch" in sys.modules)
if "torchaudio" in sys.modules:
    print(importlib.util.find_spec("torchaudio"))
    try:
        import torchaudio
    except ImportError as error:
        print(type(error).__name__)
"""
    shown = ["torchaudio"] if hidden else []
    after = "None\nModuleNotFoundError\n" if hidden else ""
    assert run(code) == f"{shown} {shown} {hidden} False\n{after}"
