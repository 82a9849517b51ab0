"""The file of API keys: one a line, each with what its owner may do.

    # KEY [name=NAME] [expires=DATE] [scope=SCOPE] [tokens-per-day=NUMBER]
    3f0c...
    9a41... name=prometheus scope=metrics
    77be... name=alice expires=2027-01-31 scope=models:7b-awq,charts tokens-per-day=2000000

Nothing of a key is ever in a message: a line's number says which one is meant, and what can't be read is not repeated,
for it may be a key.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from toolkit.errors import ServerError

__all__ = ["Key", "concerns", "key_of", "read_keys"]

#: Below this a key can be guessed, given time: 16 characters of hex are 64 bits.
_SHORT = 16
_MOST_BYTES = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
#: What a key without a name is called in logs; a name must not look like another key's.
_DIGEST_NAME = re.compile(r"[0-9a-f]{8}")
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,255}")
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe, which can be read once only"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)

Scope = Literal["all", "metrics", "models"]


@dataclass(frozen=True)
class Key:
    """A key that is let in, without the key itself."""

    #: SHA-256 of the key.
    digest: bytes
    #: What logs and metrics call it: its name, else eight digits of the digest.
    name: str
    #: Whether it is so short that it might be guessed.
    short: bool = False
    #: Its line in the file; 0 for the one that is in none.
    line: int = 0
    #: When it ends, in seconds since 1970.
    expires: float | None = None
    #: "all": every route; "models": all but the server's own figures; "metrics": reads, and asks no model.
    scope: Scope = "all"
    #: Names that its requests may have as their model. None: any.
    models: frozenset[str] | None = None
    #: Tokens, of prompts and answers together, a day by UTC.
    tokens_per_day: int | None = None


def key_of(text: str) -> Key:
    """Return a key that may do everything."""
    digest = hashlib.sha256(text.encode()).digest()
    return Key(digest, digest.hex()[:8], short=len(text) < _SHORT)


def read_keys(path: Path) -> list[Key]:
    """Return the keys of a file; blank lines and lines that start with # are skipped.

    Raises ServerError for a file that can't be read, holds no key, or holds a line that is not understood.
    """
    where = f"--api-key-file {path}"
    keys: dict[bytes, Key] = {}
    for number, line in enumerate(_text(path, where).splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key = _key(line, number, f"{where}, line {number}")
        before = keys.setdefault(key.digest, key)
        if replace(before, line=number) != key:
            raise ServerError(f"{where}, line {number}: the key of line {before.line} again, with other attributes.")
    if not keys:
        raise ServerError(f"{where} holds no key. Write one a line, such as from `openssl rand -hex 32`.")
    return list(keys.values())


def _text(path: Path, where: str) -> str:
    """Return what a regular file holds; what would block or never end is refused, not read."""
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would wait for one
        try:
            status = os.fstat(opened)
            kind = next((words for is_one, words in _KINDS if is_one(status.st_mode)), None)
            if kind is not None:
                raise ServerError(f"{where}: it can't be read (it is {kind}). Give a file.")
            content = os.read(opened, _MOST_BYTES + 1)
        finally:
            os.close(opened)
        if len(content) > _MOST_BYTES:
            raise ServerError(f"{where}: it can't be read (it has more than {_MOST_BYTES >> 20} MiB).")
        return content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ServerError(f"{where}: it can't be read ({getattr(error, 'strerror', error)}).") from None


def _key(line: str, number: int, where: str) -> Key:
    if not line.isascii() or not line.replace("\t", " ").isprintable():
        raise ServerError(f"{where}: a key is made of printable ASCII characters without spaces.")
    text, *attributes = line.split()
    key = replace(key_of(text), line=number)
    given: set[str] = set()
    for attribute in attributes:
        name, equals, value = attribute.partition("=")
        if not equals or name not in _ATTRIBUTES:
            raise ServerError(
                f"{where}: after the key come attributes, of which there are {', '.join(f'{a}=' for a in _ATTRIBUTES)}."
                " A key has no spaces."
            )
        if name in given:
            raise ServerError(f"{where}: {name}= is there twice.")
        given.add(name)
        key = _ATTRIBUTES[name](key, value, where)
    return key


def _with_name(key: Key, value: str, where: str) -> Key:
    if not _NAME.fullmatch(value) or _DIGEST_NAME.fullmatch(value):
        raise ServerError(
            f"{where}: name= takes up to 40 letters, digits, dots, dashes and underscores, and not eight hex digits, "
            "which is what keys without a name are called."
        )
    return replace(key, name=value)


def _with_expiry(key: Key, value: str, where: str) -> Key:
    try:
        at = datetime.fromisoformat(value)
    except ValueError:
        at = None
    if at is not None and len(value) <= len("2027-01-31"):
        at = at.replace(tzinfo=UTC) + timedelta(days=1)  # the day is its last
    if at is None or at.tzinfo is None:
        raise ServerError(
            f"{where}: expires= takes the last day, such as 2027-01-31 (UTC), or a time, such as 2027-01-31T12:00Z."
        )
    return replace(key, expires=at.timestamp())


def _with_scope(key: Key, value: str, where: str) -> Key:
    kind, colon, names = value.partition(":")
    models = names.split(",")
    if value == "metrics":
        return replace(key, scope="metrics")
    if value == "models":
        return replace(key, scope="models")
    if kind != "models" or not colon or not all(_MODEL.fullmatch(name) for name in models):
        raise ServerError(f"{where}: scope= takes metrics, models, or models:NAME,NAME as /v1/models lists them.")
    return replace(key, scope="models", models=frozenset(models))


def _with_budget(key: Key, value: str, where: str) -> Key:
    if not value.isdigit() or not 0 < int(value[:20]) < 10**15:
        raise ServerError(f"{where}: tokens-per-day= takes a number of at least 1.")
    return replace(key, tokens_per_day=int(value))


_ATTRIBUTES: dict[str, Callable[[Key, str, str], Key]] = {
    "name": _with_name,
    "expires": _with_expiry,
    "scope": _with_scope,
    "tokens-per-day": _with_budget,
}


def concerns(keys: list[Key], now: float) -> Iterator[str]:
    """Say what an operator should know of keys that are in force all the same."""
    for key in keys:
        which = f"the key in line {key.line}" if key.line else "the key"
        if key.short:
            yield f"{which} has fewer than {_SHORT} characters and can be guessed: make one with `openssl rand -hex 32`"
        if key.expires is not None and key.expires <= now:
            day = datetime.fromtimestamp(key.expires, UTC).isoformat(timespec="minutes")
            yield f"{which} has expired ({day}) and is refused"
