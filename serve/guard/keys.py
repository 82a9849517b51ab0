"""API keys: read from a file that may change while the server runs, compared in constant time, never written down."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from pathlib import Path

from toolkit.errors import ServerError

__all__ = ["Keys", "read_keys"]

_log = logging.getLogger("qvl.guard")
#: Seconds between two looks at the file.
_LOOK = 1.0


def read_keys(path: Path) -> list[str]:
    """Return the keys of a file: one a line, without blank lines and lines that start with #.

    Raises ServerError for a file that can't be read, holds no key, or holds a line that can be no key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"--api-key-file {path}: it can't be read ({getattr(error, 'strerror', error)}).") from None
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    for number, line in enumerate(lines, 1):
        if not line.startswith("#") and (not line.isascii() or not line.isprintable() or " " in line):
            raise ServerError(
                f"--api-key-file {path}, line {number}: a key is made of printable ASCII characters without spaces."
            )
    if not keys:
        raise ServerError(f"--api-key-file {path} holds no key. Write one a line, such as from `openssl rand -hex 32`.")
    return keys


class Keys:
    """The keys that are let in. What is kept of each is its SHA-256; eight digits of that are its name in logs."""

    def __init__(self, path: Path | None, key: str | None = None, look_seconds: float = _LOOK) -> None:
        """Read the file once; raises ServerError as `read_keys`."""
        self._path, self._look = path, look_seconds
        self._fixed = [_digest(key)] if key is not None else []
        self._seen: object = None
        self._next_look = 0.0
        self._digests = self._fixed
        if path is not None:
            self._seen = _signature(path)
            self._digests = self._fixed + [_digest(each) for each in read_keys(path)]
            self._next_look = time.monotonic() + look_seconds

    def name_of(self, key: bytes) -> str | None:
        """Return the name of a key that is let in, None for any other. Takes as long for a wrong one as for a right."""
        if self._path is not None and time.monotonic() >= self._next_look:
            self._reread(self._path)
        digest = hashlib.sha256(key).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(digest, known)
        return digest.hex()[:8] if found else None

    def _reread(self, path: Path) -> None:
        """Take over the file's keys if it changed; keep the old ones if it can't be read or holds none."""
        self._next_look = time.monotonic() + self._look
        signature = _signature(path)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            digests = self._fixed + [_digest(key) for key in read_keys(path)]
        except ServerError as error:
            _log.error("%s The keys before stay in force.", error)
            return
        self._digests = digests
        _log.warning("--api-key-file %s changed: %d keys in force", path, len(digests))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _signature(path: Path) -> object:
    """Return what changes when a file is replaced or written to; None when it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_dev, status.st_mtime_ns, status.st_size
