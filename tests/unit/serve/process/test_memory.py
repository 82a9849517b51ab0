from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from serve.process import memory
from serve.settings.config import ServerConfig
from tests.support import tiny
from tests.unit.serve.settings.test_backend import nvidia_smi
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ResourceError, ResourceInUse
from toolkit.paths import demo_checkpoint

GIB = 1 << 30


def sparse(directory: Path, gib: int) -> Checkpoint:
    """A checkpoint whose header promises one tensor of so many GiB more, in a file that takes no room on disk."""
    tiny.write(directory)
    file = directory / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    entry = {"dtype": "F16", "shape": [gib << 29], "data_offsets": [end, end + (gib << 30)]}
    header["model.rotary_emb.inv_freq"] = entry  # which engines pass over
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    os.truncate(file, 8 + len(encoded) + end + (gib << 30))
    return Checkpoint.open(directory)


def test_the_demo_needs_little() -> None:
    need = memory.need(Checkpoint.open(demo_checkpoint()), ServerConfig(backend="cpu"))
    assert need.weights < 16 << 20
    assert need.total == need.weights + need.kv_cache + need.overhead < 2 * GIB


def test_float32_doubles_the_weights() -> None:
    demo = Checkpoint.open(demo_checkpoint())
    half = memory.need(demo, ServerConfig(backend="cpu"))
    full = memory.need(demo, ServerConfig(backend="cpu", dtype="float32"))
    assert full.weights == 2 * half.weights
    assert full.kv_cache == 2 * half.kv_cache


def test_packed_weights_keep_their_size(tmp_path: Path) -> None:
    awq = Checkpoint.open(tiny.write(tmp_path / "awq", version="gemm"))
    assert memory.need(awq, ServerConfig(backend="cpu")).weights == awq.nbytes


def test_too_large_for_the_host(tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match=r"needs about 90\d\.\d GiB \(weights 90\d\.\d.* GiB are available"
    ) as error:
        memory.check(sparse(tmp_path / "huge", 900), ServerConfig(backend="cpu"))
    assert not isinstance(error.value, ResourceInUse)  # nobody need wait for that
    assert "Quantize it first" in str(error.value)


def test_too_large_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA L4, 23034, 22565")
    large, options = sparse(tmp_path / "large", 20), ServerConfig(backend="gpu")
    with pytest.raises(ResourceError, match=r"NVIDIA L4 has 22\.0 of 22\.5 GiB free, .* share of 0\.9"):
        memory.check(large, options)
    memory.check(large, ServerConfig(backend="gpu", gpu_memory_utilization=0.97))
    memory.check(large, ServerConfig(backend="gpu", extra=("--tensor-parallel-size=2",)))


def test_who_uses_the_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model fits the card: smaller settings are no help then, others are in the way."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        '#!/bin/sh\ncase "$1" in *compute-apps*) echo "999999999, python train.py, 21000 MiB";; '
        "*) echo NVIDIA L4, 23034, 900;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ResourceInUse) as caught:
        memory.check(Checkpoint.open(demo_checkpoint()), ServerConfig(backend="gpu"))
    message = str(caught.value)
    assert (
        "Stop what uses the GPU (python train.py (pid 999999999, 21000 MiB)): the model needs about 1.5 GiB" in message
    )
    assert "Quantize" not in message and "--gpu-memory-utilization" not in message


def test_memory_that_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 20)
    with pytest.raises(ResourceInUse, match=r"0\.0 GiB are available\. Stop what else takes memory, or: Quantize"):
        memory.check(Checkpoint.open(demo_checkpoint()), ServerConfig(backend="cpu"))


def test_gpu_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "NVIDIA L4, 20000, 10000")
    small = Checkpoint.open(demo_checkpoint())
    with pytest.raises(ResourceError, match=r"give --gpu-memory-utilization 0\.5\."):
        memory.check(small, ServerConfig(backend="gpu"))
    memory.check(small, ServerConfig(backend="gpu", gpu_memory_utilization=0.5))


def test_no_gpu_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, monkeypatch, "", 9)
    with pytest.raises(ResourceError, match="--backend cpu"):
        memory.check(Checkpoint.open(demo_checkpoint()), ServerConfig(backend="gpu"))
