"""Files are there whole or not at all, and locks are held as long as they should be."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toolkit import files
from toolkit.paths import source_root


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    for content in ("old, with Ü", b"new"):
        files.write_whole(path, content)
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("durable", [False, True])
def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path, durable=durable) as temporary:
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.replacing(path, durable=durable) as temporary:
        files.write_synced(temporary, b"new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        files.write_whole(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("there", ["nothing", "an empty directory", "an old one"])
def test_a_directory_is_put_in_place(tmp_path: Path, there: str) -> None:
    draft, out, aside = tmp_path / "draft", tmp_path / "out", tmp_path / "aside"
    draft.mkdir()
    (draft / "new").touch()
    if there != "nothing":
        out.mkdir()
    if there == "an old one":
        (out / "old").touch()
        (aside / "older").mkdir(parents=True)  # of a killed run
    files.put_in_place(draft, out, aside)
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_old_directory_goes_back_when_the_new_one_cannot_come(tmp_path: Path) -> None:
    out, aside = tmp_path / "out", tmp_path / "aside"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(FileNotFoundError):
        files.put_in_place(tmp_path / "missing", out, aside)
    assert [p.name for p in out.iterdir()] == ["old"] and not aside.exists()


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path: Path) -> None:
    held = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    other = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    assert files.lock(held, wait=False)
    assert not files.lock(other, wait=False)
    os.close(held)
    assert files.lock(other, wait=False)
    os.close(other)


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = (
        "from pathlib import Path; from toolkit.files import locked\n"
        f"print('up', flush=True)\nwith locked(Path({str(path)!r})): print('in', flush=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(source_root())}
    with files.locked(path):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        assert child.poll() is None
    assert child.stdout.readline() == "in\n"
    assert child.wait() == 0
    child.stdout.close()


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    expected = hashlib.blake2b(b"abc" * 100_000, digest_size=files.DIGEST_BYTES).digest()
    assert files.file_digest(tmp_path / "f") == expected


def test_free_space_of_what_is_not_there_yet(tmp_path: Path) -> None:
    assert files.free_bytes(tmp_path / "a" / "b") > 0
