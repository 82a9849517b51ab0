"""The compiler's side: what was compiled is kept, a missing or failing compiler ends in one error."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from serve.kernels import nvrtc
from toolkit.errors import ServerError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc._library.cache_clear()


def test_no_compiler_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerError, match="there is no NVRTC"):
        nvrtc.compile_cubin("x", [])


def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_once(library: object, source: str, options: list[str]) -> bytes:
        compiled.append((source, tuple(options)))
        return f"{source} {options}".encode()

    monkeypatch.setenv("QVL_CACHE", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_library", lambda: (object(), "13.0"))
    monkeypatch.setattr(nvrtc, "_compile", compile_once)
    first = nvrtc.compile_cubin("a", ["-DX=1"])
    assert nvrtc.compile_cubin("a", ["-DX=1"]) == first and len(compiled) == 1
    assert nvrtc.compile_cubin("a", ["-DX=2"]) != first and nvrtc.compile_cubin("b", ["-DX=1"]) != first
    assert len(compiled) == 3
    monkeypatch.setattr(nvrtc, "_library", lambda: (object(), "13.1"))
    nvrtc.compile_cubin("a", ["-DX=1"])
    assert len(compiled) == 4  # another compiler, another kernel
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file.suffix != ".cubin"]


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QVL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(nvrtc, "_library", lambda: (object(), "13.0"))
    monkeypatch.setattr(nvrtc, "_compile", lambda *arguments: b"cubin")
    assert nvrtc.compile_cubin("a", []) == b"cubin"
