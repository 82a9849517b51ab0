"""The server's account of its own memory: its group's processes by kind, and GPUs by NVML."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from serve.app import memory
from serve.app.memory import MemoryCollector, gpu_memory, group, host_memory

MB = 2**20
#: A leader that starts a process with a title of vLLM's and 64 MB, and says when both are there.
LEADER = """
import subprocess, sys
held = bytearray(b'x') * (16 * 2**20)
code = "import sys; held = bytearray(b'x') * (64 * 2**20); print('here', flush=True); sys.stdin.read()"
PIPE = subprocess.PIPE
child = subprocess.Popen([sys.executable, '-c', code, 'VLLM::EngineCore'], stdin=PIPE, stdout=PIPE)
child.stdout.readline()
print('here', flush=True)
sys.stdin.read()
"""


@pytest.fixture
def leader() -> Iterator[int]:
    command = [sys.executable, "-c", LEADER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "here\n"
        yield process.pid
        process.stdin.close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
def test_a_group_is_counted_by_kind(leader: int) -> None:
    pids = group(leader)
    assert len(pids) == 2 and leader in pids and os.getpid() not in pids
    found = host_memory(pids, own=leader)
    assert set(found) == {"api", "engine", "shared"}
    assert 16 * MB < found["api"] < 60 * MB
    assert 64 * MB < found["engine"] < 130 * MB


def proc(tmp_path: Path, pid: int, title: str, anon: int, shmem: int) -> None:
    directory = tmp_path / str(pid)
    directory.mkdir()
    (directory / "status").write_text(
        f"Name:\tx\nVmRSS:\t99 kB\nRssAnon:\t{anon} kB\nRssFile:\t7 kB\nRssShmem:\t{shmem} kB\n"
    )
    (directory / "cmdline").write_bytes(title.encode() + b"\0")


def test_shared_memory_counts_once_and_files_do_not(tmp_path: Path) -> None:
    proc(tmp_path, 1, "python\0-m\0serve.app.server", 100, 40)
    proc(tmp_path, 2, "VLLM::EngineCore", 200, 50)
    proc(tmp_path, 3, "VLLM::Worker_TP0", 300, 50)
    proc(tmp_path, 4, "VLLM::Worker_TP1", 300, 50)
    proc(tmp_path, 5, "python\0-c\0from multiprocessing.resource_tracker", 10, 0)
    kib = {"api": 100, "engine": 200, "worker": 600, "other": 10, "shared": 50}
    found = host_memory([1, 2, 3, 4, 5, 999], own=1, proc=tmp_path)  # 999 has ended
    assert found == {kind: 1024 * size for kind, size in kib.items()}
    assert host_memory([999], own=999, proc=tmp_path) == {}


class Nvml:
    """NVML with two cards."""

    NVMLError = RuntimeError

    def __init__(self, *processes: dict[int, int | None]) -> None:
        self.processes = processes

    def nvmlDeviceGetCount(self) -> int:
        return len(self.processes)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in self.processes[handle].items()]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(used=1000 + handle)

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"


def test_gpus_of_the_servers_processes() -> None:
    assert gpu_memory(Nvml({7: 100, 8: 50, 9: 3}, {8: 20}), [7, 8]) == {(0, "server"): 150, (1, "server"): 20}


def test_whole_cards_where_processes_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvml = Nvml({1: None}, {})
    assert gpu_memory(nvml, [7]) == {(0, "card"): 1000, (1, "card"): 1001}
    for named in ("1", "GPU-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        assert gpu_memory(nvml, [7]) == {(1, "card"): 1001}


def page() -> str:
    registry = CollectorRegistry()
    registry.register(MemoryCollector())
    return generate_latest(registry).decode()


def test_the_page_has_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_nvml", lambda: Nvml({os.getpid(): 123456}))
    assert 'qvl_host_memory_bytes{process="api"}' in page()
    assert 'qvl_gpu_memory_bytes{gpu="0",of="server"} 123456.0' in page()


def test_a_driver_that_fails_costs_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(Nvml):
        def nvmlDeviceGetCount(self) -> int:
            raise RuntimeError("the GPU fell off the bus")

    monkeypatch.setattr(memory, "_nvml", lambda: Lost({}))
    assert 'qvl_host_memory_bytes{process="api"}' in page() and "qvl_gpu_memory_bytes{" not in page()


def test_no_gpu_no_series() -> None:
    assert memory._nvml() is None or "qvl_gpu_memory_bytes{" in page()
