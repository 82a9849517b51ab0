"""API keys: read from a file that may change while the server runs, compared in constant time, never written down.

What a line of the file may say is in `serve.guard.keyfile`; here is which keys are in force, and what each may do.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve.guard.keyfile import Key, concerns, key_of, read_keys
from serve.http.errors import Refusal
from serve.http.logs import line, write
from toolkit.errors import ServerError

__all__ = ["Key", "Keys", "check_key", "check_model", "read_keys"]

#: Seconds between two looks at the file.
_LOOK = 1.0
#: What a key for metrics reads. It tells of the server, and asks no model.
_READS = frozenset({"/metrics", "/version", "/v1/models"})
#: What a key for models alone does not: they tell of everybody's requests.
_FIGURES = frozenset({"/metrics", "/version"})


class Keys:
    """The keys that are let in. What is kept of each is its SHA-256."""

    def __init__(self, path: Path | None, key: str | None = None, look_seconds: float = _LOOK) -> None:
        """Read the file once; raises ServerError as `read_keys`."""
        self._path, self._look = path, look_seconds
        self._fixed = [key_of(key)] if key is not None else []
        self._seen: object = None
        self._next_look = 0.0
        self._keys = self._fixed
        if path is not None:
            self._seen = _signature(path)
            self._keys = self._fixed + read_keys(path)
            self._next_look = time.monotonic() + look_seconds
        self._voice_concerns()

    def find(self, key: bytes) -> Key | None:
        """Return what is known of a key that is let in, None for any other.

        Takes as long for a wrong one as for a right one. Whether it has expired is `check_key`'s to say.
        """
        if self._path is not None and time.monotonic() >= self._next_look:
            self._reread(self._path)
        digest = hashlib.sha256(key).digest()
        found: Key | None = None
        for known in self._keys:
            if hmac.compare_digest(digest, known.digest):
                found = known
        return found

    def name_of(self, key: bytes) -> str | None:
        """Return what a key that is let in is called, None for any other."""
        found = self.find(key)
        return None if found is None else found.name

    def _reread(self, path: Path) -> None:
        """Take over the file's keys if it changed; keep the old ones if it can't be read or holds none."""
        self._next_look = time.monotonic() + self._look
        signature = _signature(path)
        if signature == self._seen:
            return
        self._seen = signature
        try:
            keys = self._fixed + read_keys(path)
        except ServerError as error:
            _log("error", f"{error} The keys before stay in force.")
            return
        self._keys = keys
        _log("warning", f"--api-key-file {path} changed: {len(keys)} keys in force")
        self._voice_concerns()

    def _voice_concerns(self) -> None:
        for text in concerns(self._keys, time.time()):
            _log("warning", f"--api-key-file {self._path}: {text}" if self._path is not None else text)


def check_key(key: Key, path: str, clock: Callable[[], float] = time.time) -> None:
    """Refuse a key that has ended, or is not for this route. Raises Refusal."""
    if key.expires is not None and clock() >= key.expires:
        challenge = [(b"www-authenticate", b"Bearer")]
        raise Refusal(401, "key_expired", "This key has expired. Ask for a new one.", headers=challenge)
    if key.scope == "metrics" and path not in _READS:
        raise Refusal(403, "scope", "This key is for reading metrics: it may ask no model.")
    if key.scope == "models" and path in _FIGURES:
        raise Refusal(403, "scope", "This key is for asking models: it may not read the server's figures.")


def check_model(key: Key, request: dict[str, Any]) -> None:
    """Refuse a request for a model that the key is not for. Raises Refusal."""
    if key.models is not None and request.get("model") not in key.models:
        names = ", ".join(sorted(key.models))
        raise Refusal(403, "scope", f"This key is for the model {names}. Name it as the model.", "model")


def _log(level: str, message: str) -> None:
    """Write a line whatever the format of vLLM's own log is: who changed keys must be able to see that they count."""
    write(line(level, "qvl.guard", message))


def _signature(path: Path) -> object:
    """Return what changes when a file is replaced or written to; None when it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_dev, status.st_mtime_ns, status.st_size
