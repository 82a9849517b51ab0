"""Files that are there whole or not at all: write-then-rename, sync, lock, digest, free space.

A file or directory is written under another name beside its own and renamed when it is complete, so that readers see
the old one or the new one. POSIX only, as `fcntl` is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "DIGEST_BYTES",
    "file_digest",
    "free_bytes",
    "fsync",
    "lock",
    "locked",
    "put_in_place",
    "replacing",
    "unlock",
    "write_synced",
    "write_whole",
]

#: Length of a digest: BLAKE2b cut to that of SHA-1.
DIGEST_BYTES = 20


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a name beside ``path``; the file written there takes the place of ``path`` when the block ends.

    After an error in the block ``path`` is as it was, and the other file is gone.

    Args:
        path: the file to make or replace; its directory must be there.
        durable: wait until the new name is on the disk. What is written must be synced in the block (`write_synced`).
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, so that readers find the old content or the new. Its directory must be there."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def put_in_place(draft: Path, out: Path, aside: Path) -> None:
    """Rename a finished directory to ``out``.

    Args:
        draft: the finished directory, on the file system of ``out``.
        out: where it goes. What is there is replaced.
        aside: where the replaced directory is meanwhile; removed at the end. When ``out`` can't be taken it goes back.

    Raises OSError when ``out`` can't be taken.
    """
    if not (out.exists() and any(out.iterdir())):
        draft.rename(out)  # also takes the place of an empty directory
        return
    shutil.rmtree(aside, ignore_errors=True)
    out.rename(aside)
    try:
        draft.rename(out)
    except BaseException:
        aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file, to be on the disk on return."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def fsync(path: Path) -> None:
    """Wait until a file's content, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file or directory until its descriptor is closed, here and in forked children.

    Returns:
        whether it is locked now; False, where another holds it and ``wait`` is not set.

    Raises OSError where the file system has no locks (network file systems lock no directories).
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Unlock and close what `lock` locked; forked children, who have the descriptor too, hold it no longer either."""
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that the file ``path`` stands for; waits while another process holds it. The file stays."""
    with path.open("w") as file:
        lock(file.fileno(), wait=True)  # released when the file closes
        yield


def file_digest(path: Path) -> bytes:
    """Return the BLAKE2b digest of a file's content, `DIGEST_BYTES` long."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()


def free_bytes(place: Path) -> int:
    """Return what this user may still write on the file system of ``place``, or of the first parent that is there."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
