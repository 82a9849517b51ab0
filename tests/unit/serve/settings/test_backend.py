from __future__ import annotations

import os
from pathlib import Path

import pytest

from serve.settings.backend import Gpu, choose, find_gpus, installed_vllm, require_vllm
from toolkit.errors import ServerError


def nvidia_smi(directory: Path, monkeypatch: pytest.MonkeyPatch, output: str, status: int = 0) -> None:
    """Put a program of that name first on PATH."""
    program = directory / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")


def test_gpus_as_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA H100 80GB HBM3, 81559, 81006\nNVIDIA L4, 23034, 22565")
    assert find_gpus() == [
        Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, 81006 << 20),
        Gpu("NVIDIA L4", 23034 << 20, 22565 << 20),
    ]


@pytest.mark.parametrize(("output", "status"), [("", 0), ("No devices were found", 6), ("X, [N/A], [N/A]", 0)])
def test_no_usable_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, status: int) -> None:
    nvidia_smi(tmp_path, monkeypatch, output, status)
    assert find_gpus() == []


def test_no_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_gpus() == []


def test_option_before_environment_before_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    build = installed_vllm()
    assert build is not None, "these tests run where vLLM is installed"
    assert choose() == build[0]
    monkeypatch.setenv("QVL_BACKEND", "gpu")
    assert choose() == "gpu"
    assert choose("cpu") == "cpu"


def test_unknown_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServerError, match="--backend is 'tpu': give cpu or gpu"):
        choose("tpu")
    monkeypatch.setenv("QVL_BACKEND", "npu")
    with pytest.raises(ServerError, match="QVL_BACKEND is 'npu'"):
        choose()


def test_wrong_build_is_refused() -> None:
    build = installed_vllm()
    assert build is not None
    assert require_vllm(build[0]) == build[1]
    other = "gpu" if build[0] == "cpu" else "cpu"
    with pytest.raises(ServerError, match=f"make setup BACKEND={other}"):
        require_vllm(other)
