"""CUDA C++ to machine code with NVRTC, which comes with torch's CUDA build: no nvcc on the user's machine.

What was compiled is kept in the cache directory, by the source, the options and NVRTC's version.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

from toolkit.errors import ServerError
from toolkit.paths import cache_dir

__all__ = ["compile_cubin"]


def compile_cubin(source: str, options: Sequence[str]) -> bytes:
    """Return the cubin of CUDA C++ source.

    Args:
        source: the program.
        options: NVRTC's, such as ``-arch=sm_90`` or ``-DNAME=1``.

    Raises ServerError where there is no NVRTC, or it does not take the source.
    """
    nvrtc, version = _library()
    key = hashlib.sha256("\0".join([version, *options, source]).encode()).hexdigest()[:32]
    kept = cache_dir("kernels", f"{key}.cubin")
    if kept.is_file() and (cubin := kept.read_bytes()):
        return cubin
    cubin = _compile(nvrtc, source, options)
    _keep(kept, cubin)
    return cubin


def _keep(path: Path, content: bytes) -> None:
    """Write a file of the cache, whole or not at all; a cache that can't be written is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as stream:
            stream.write(content)
        Path(stream.name).replace(path)
    except OSError:
        pass


@functools.cache
def _library() -> tuple[ctypes.CDLL, str]:
    """Find NVRTC beside torch, else where the system has it, and say its version."""
    found = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in found.submodule_search_locations or ()] if found else []
    names = [str(file) for place in places for file in sorted(place.glob("*/lib/libnvrtc.so.*"))]
    for name in [
        *(name for name in names if "builtins" not in name),
        "libnvrtc.so.13",
        "libnvrtc.so.12",
        "libnvrtc.so",
    ]:
        try:
            nvrtc = ctypes.CDLL(name)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        return nvrtc, f"{major.value}.{minor.value}"
    raise ServerError("there is no NVRTC (libnvrtc.so), which torch's CUDA build brings")


def _compile(nvrtc: ctypes.CDLL, source: str, options: Sequence[str]) -> bytes:
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None))
    try:
        given = [option.encode() for option in options]
        if nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given)):
            raise ServerError(f"NVRTC does not take the kernel: {_text(nvrtc, program, 'ProgramLog')[:500]}")
        size = ctypes.c_size_t()
        _check(nvrtc, nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.value.decode(errors="replace").strip()


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise ServerError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(result).decode()}")
