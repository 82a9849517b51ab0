from __future__ import annotations

import random
import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from bench.machine.energy import joules_per_token, open_meter


class NVMLError(Exception):
    pass


@dataclass
class Gpu:
    millijoules: int | None = 5000
    pids: tuple[int, ...] = ()
    mig: bool | None = None
    uuid: str = "GPU-00"


@dataclass
class Nvml:
    """As much of pynvml as is used."""

    gpus: list[Gpu] = field(default_factory=list)
    works: bool = True

    NVMLError = NVMLError

    def nvmlInit(self) -> None:
        if not self.works:
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in gpu.pids]

    def nvmlDeviceGetMigMode(self, gpu: Gpu) -> list[int]:
        if gpu.mig is None:
            raise NVMLError("Not Supported")
        return [int(gpu.mig), int(gpu.mig)]

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: Gpu) -> int:
        if gpu.millijoules is None:
            raise NVMLError("Not Supported")
        return gpu.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    module = types.ModuleType("pynvml")
    module.__getattr__ = lambda name: getattr(fake, name)  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_counters_are_summed_in_joules(nvml: Nvml) -> None:
    nvml.gpus = [Gpu(1500), Gpu(2500)]
    meter = open_meter()
    assert meter is not None
    assert (meter.indices, meter.joules()) == ((0, 1), 4.0)
    nvml.gpus[1].millijoules = 6500
    assert meter.joules() == 8.0


def test_the_gpus_of_the_servers_processes_are_metered(nvml: Nvml) -> None:
    nvml.gpus = [Gpu(pids=(7,)), Gpu(pids=(8, 9)), Gpu(), Gpu(pids=(9,))]
    meter = open_meter({9, 10})
    assert meter is not None and meter.indices == (1, 3)


@pytest.mark.parametrize(
    ("named", "indices"),
    [(None, (0, 1, 2)), ("1", (1,)), ("2, 0", (0, 2)), ("GPU-b", (1,)), ("GPU-a,GPU-c0", (0, 2)), ("1,7", (1,))],
)
def test_where_processes_are_not_known_the_environment_says(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, named: str | None, indices: tuple[int, ...]
) -> None:
    nvml.gpus = [Gpu(uuid="GPU-a0"), Gpu(uuid="GPU-b0"), Gpu(uuid="GPU-c0")]
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    meter = open_meter({1})
    assert meter is not None and meter.indices == indices


@pytest.mark.parametrize(
    ("gpus", "visible"),
    [
        ([], None),
        ([Gpu(None)], None),
        ([Gpu(), Gpu(None)], None),
        ([Gpu(mig=True)], None),
        ([Gpu()], ""),
        ([Gpu()], "-1"),
    ],
    ids=["no GPU", "no counter", "one without", "shared by MIG", "none visible", "hidden"],
)
def test_where_there_is_nothing_to_meter_there_is_no_meter(
    nvml: Nvml, monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], visible: str | None
) -> None:
    nvml.gpus = gpus
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert open_meter() is None


def test_mig_that_is_off_is_no_sharing(nvml: Nvml) -> None:
    nvml.gpus = [Gpu(mig=False)]
    assert open_meter() is not None


def test_without_a_driver_or_the_package_there_is_no_meter(nvml: Nvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.works = False
    assert open_meter() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_meter() is None


def test_a_gpu_that_is_lost_meanwhile_is_told_by_none(nvml: Nvml) -> None:
    nvml.gpus = [Gpu()]
    meter = open_meter()
    assert meter is not None
    nvml.gpus[0].millijoules = None
    assert meter.joules() is None


def test_energy_of_a_token() -> None:
    rng = random.Random(0)
    for _ in range(50):
        before, spent, tokens = rng.random() * 1e6, rng.random() * 1e4, rng.randrange(1, 10**6)
        assert joules_per_token(before, before + spent, tokens) == pytest.approx(spent / tokens, rel=1e-6)
    assert joules_per_token(None, 1.0, 1) is None
    assert joules_per_token(1.0, None, 1) is None
    assert joules_per_token(1.0, 2.0, 0) is None
    assert joules_per_token(1.0, 2.0, None) is None
    assert joules_per_token(2.0, 1.0, 5) is None
