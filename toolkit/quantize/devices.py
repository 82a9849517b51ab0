"""The devices that a run is to use, by torch's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.errors import ResourceError

if TYPE_CHECKING:
    import torch

__all__ = ["find_devices", "made_ready"]


def find_devices(names: str) -> list[str]:
    """Turn ``auto``, ``cpu``, ``cuda:1`` or ``0,1`` into torch's names of devices that are there."""
    import torch

    if names == "auto":
        names = "cuda" if torch.cuda.is_available() else "cpu"
    found = []
    for name in names.split(","):
        name = f"cuda:{name}" if name.isdigit() else name
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ResourceError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:N or a list as in 0,1") from None
        if device.type == "cuda":
            if not torch.cuda.is_available():
                raise ResourceError("no CUDA device here: use --devices cpu, or install a driver and a CUDA torch")
            if device.index is not None and device.index >= torch.cuda.device_count():
                raise ResourceError(f"no device {name}: this machine has {torch.cuda.device_count()}")
            device = torch.device("cuda", device.index or 0)
        elif device.type != "cpu":
            raise ResourceError(f"device {name!r} is not supported: use auto, cpu, cuda, cuda:N or a list as in 0,1")
        found.append(str(device))
    if len(set(found)) < len(found) and "cpu" not in found:
        raise ResourceError(f"--devices {names} names a device twice")
    return found


def made_ready(name: str) -> torch.device:
    """Return a device by torch's name, set up for what follows: the current one, its peak of memory counted from now
    on, its float32 products in TF32."""
    import torch

    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    return device
