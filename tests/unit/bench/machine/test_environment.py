from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from bench.machine import environment


def test_keys_are_not_printed() -> None:
    shown = environment.command_line(["bench", "--api-key", "k1", "--api-key=k2", "--tasks", "my file.jsonl"])
    assert shown == "qvl bench --api-key *** --api-key=*** --tasks 'my file.jsonl'"
    assert "pw" not in environment.command_line(["bench", "--baseline", "http://me:pw@host/v1", "--x=https://pw@host"])


def test_the_system_is_described() -> None:
    assert environment.system_name().startswith(f"{platform.system()} {platform.machine()}")
    assert platform.node() not in environment.system_name()


def test_versions_name_what_is_installed() -> None:
    found = environment.versions()
    assert found["python"].count(".") == 2
    assert "httpx" in found and "numpy" in found


def test_the_processor_is_described() -> None:
    assert "cores" in environment.cpu_name() and "GiB" in environment.cpu_name()


def test_gpus_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.gpu_names() == []
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB, 580.1'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert environment.gpu_names() == ["NVIDIA H100, 81559 MiB, 580.1"]
