from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine import resources
from toolkit.checkpoint.compressed import quantization_config


def test_disk_counts_files_behind_links(tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    blob.write_bytes(b"x" * 500)
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    (directory / "model.safetensors").symlink_to(blob)
    (directory / "sub" / "config.json").write_bytes(b"y" * 20)
    assert resources.disk(directory) == resources.Disk(total=520, weights=500)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        (
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}},
            "awq 4 bits, group 64, gemv",
        ),
        ({"quantization_config": quantization_config(128, [])}, "compressed-tensors 4 bits, group 128"),
        ({"quantization_config": quantization_config(-1, [])}, "compressed-tensors 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({}, "unknown"),
        (None, "unknown"),
    ],
)
def test_how_weights_are_stored_is_said(tmp_path: Path, config: dict[str, object] | None, words: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert resources.quantization(tmp_path) == words


@pytest.mark.parametrize(("text", "kind"), [('{"model_type": "qwen2_vl"}', "qwen2_vl"), ("{}", None), ("[", None)])
def test_which_family_a_checkpoint_is_of_is_said(tmp_path: Path, text: str, kind: str | None) -> None:
    (tmp_path / "config.json").write_text(text)
    assert resources.model_type(tmp_path) == kind


def test_memory_of_a_process_tree_counts_children_and_not_shared_pages_twice() -> None:
    # A parent that fills 60 MB and shares it with two forks.
    script = (
        "import os, sys\nbig = bytearray(os.urandom(60_000_000))\n"
        "for _ in range(2):\n    if os.fork() == 0:\n        sys.stdin.read(); os._exit(0)\n"
        "print('ready', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = resources.host_memory(process.pid)
        process.communicate()
    assert found is not None
    assert found.kind == "pss"
    assert 55e6 < found.total < 110e6  # three times 60 MB would be counted as resident


def test_memory_of_a_process_that_is_gone_is_unknown() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert resources.host_memory(process.pid) is None


def test_gpu_memory_is_that_of_the_servers_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\necho '{os.getpid()}, 1500'\necho '1, 9000'\necho '{os.getpid()}, [N/A]'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert resources.gpu_memory(os.getpid()) == 1500 * 2**20


def test_gpu_memory_is_unknown_without_the_tool_or_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert resources.gpu_memory(os.getpid()) is None
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\nexit 9\n")
    command.chmod(0o755)
    assert resources.gpu_memory(os.getpid()) is None
    command.write_text("#!/bin/sh\necho '1, 9000'\n")
    assert resources.gpu_memory(os.getpid()) is None


def test_weights_in_memory_are_read_from_the_log() -> None:
    line = "INFO 11-23 [gpu_model_runner.py:5150] Model loading took {} GiB memory and 2.0 seconds\n"
    assert resources.weights_in_memory(line.format("6.65") + "x\n") == round(6.65 * 2**30)
    assert resources.weights_in_memory(line.format("1.5") + line.format("1.5")) == 3 * 2**30
    assert resources.weights_in_memory("nothing") is None
    assert resources.weights_in_memory(line.format("0.01")) is None  # anything from 5 to 16 MB


@pytest.mark.parametrize(
    ("line", "kernel"),
    [
        ("INFO [auto_awq.py:451] Using MarlinLinearKernel for AutoAWQMarlinLinearMethod", "Marlin"),
        ("INFO [__init__.py:923] Using MacheteLinearKernel for mixed-precision linear", "Machete"),
        ("INFO Using FlashAttention for attention", None),
        ("", None),
    ],
)
def test_the_kernel_is_read_from_the_log(line: str, kernel: str | None) -> None:
    assert resources.kernel(f"first\n{line}\nlast") == kernel
