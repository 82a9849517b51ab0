"""What vLLM's log says: how far a boot has come, and why one failed, in a few lines instead of 200."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from toolkit.errors import QvlError, ResourceError, ServerError

__all__ = ["Phases", "cap", "cause_of_death", "decisive_lines", "explain", "follow", "last_words", "read_from", "size"]

#: "(EngineCore pid=12) ERROR 11-23 04:45:07 [core.py:1120] message" -> "message".
_LEVEL = r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)? \[[^\]]*\] ?"
_PREFIX = re.compile(rf"^(?:\([^()]*pid=\d+\)\s?)*(?:{_LEVEL})?")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")

#: What a line of the log announces. The last that matched is the phase; order is the order of a boot.
_PHASES = (
    ("Resolved architecture", "reading the model"),
    ("Multi-modal warmup completed", "starting the engine"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Starting to load model", "loading weights"),
    ("Loading weights took", "preparing the KV cache"),
    ("Warming up model for the compilation", "compiling"),
    ("for vLLM's torch.compile", "compiling"),
    ("Capturing CUDA graph", "capturing CUDA graphs"),
    ("KV cache size", "warming up"),
    ("Supported tasks", "opening the endpoint"),
    ("Application startup complete", "asking the first image question"),
)


@dataclass
class Phases:
    """Follows a growing log file and says which phase of the boot it has reached."""

    log: Path
    current: str = "importing vLLM"
    #: Bytes at its beginning that tell of an earlier boot.
    start: int = 0
    _offset: int = field(default=-1, repr=False)
    _partial: str = field(default="", repr=False)

    def update(self) -> str:
        """Read what was appended since the last call and return the phase."""
        self._offset = max(self._offset, self.start)
        with self.log.open("rb") as stream:
            stream.seek(self._offset)
            appended = stream.read()
        self._offset += len(appended)
        *lines, self._partial = (self._partial + appended.decode(errors="replace")).split("\n")
        for line in lines:
            for mark, phase in _PHASES:
                if mark in line:
                    self.current = phase
        return self.current


def read_from(log: Path, start: int = 0, most: int = 4 << 20) -> str:
    """Return what a log holds after its first `start` bytes (all of it where it was cut since), the last `most`."""
    with contextlib.suppress(OSError), log.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(start if start <= size else 0, size - most))
        return stream.read().decode(errors="replace")
    return ""


def size(log: Path) -> int:
    """Return the bytes that a log has now; 0 where it is not there."""
    try:
        return log.stat().st_size
    except OSError:
        return 0


def follow(log: Path, while_true: Callable[[], bool]) -> Iterator[str]:
    """Yield the lines that are appended to a log from now on, until `while_true` says no and all are read."""
    with log.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        partial = b""
        while True:
            last_round = not while_true()
            if os.fstat(stream.fileno()).st_size < stream.tell():  # `cap` has cut it
                stream.seek(0)
            *lines, partial = (partial + stream.read()).split(b"\n")
            for line in lines:
                yield line.decode(errors="replace")
            if last_round:
                return
            time.sleep(0.2)


def cap(log: Path, limit: int) -> None:
    """Keep a log that is being appended to below `limit` bytes: what it holds moves to LOG.1, over what was there.

    The file is cut, not renamed: its writers hold it open. A line written in between is lost; so is the old part
    where the disk has no room for it.
    """
    try:
        if log.stat().st_size <= limit:
            return
        with contextlib.suppress(OSError):
            shutil.copyfile(log, log.with_suffix(".log.1"))
        os.truncate(log, 0)
    except OSError:
        return  # the next call tries again


#: The last line of a Python traceback: "ValueError: message", "torch.OutOfMemoryError: message".
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)(?::\s.*|)$")
_ARGUMENT_ERROR = re.compile(r"^(?:vllm.*|usage.*|python.*): error: ")
#: Exceptions that only say that another process failed, or repeat it.
_SECONDHAND = re.compile(
    r"Engine core initialization failed|WorkerProc initialization failed|Engine process failed|returned non-zero exit"
    r"|failed to be inspected|Failed core proc|EngineDeadError|^asyncio\.exceptions|CancelledError"
)


#: What the log says when the engine itself fails, not a request.
_FATAL = re.compile(
    r"EngineCore encountered a fatal error|output_handler failed|died unexpectedly|Fatal Python error"
    r"|terminate called after throwing"
)
_WORKER_DIED = re.compile(r"^(?:Worker proc|RayWorkerProc) .*died unexpectedly.*")
_UP = re.compile(r'Application startup complete|"logger": "qvl\.ready", "message": "ready')
_ANSWERED = re.compile(r'"logger": "qvl\.requests",.*"status": [23]\d\d')


def last_words(text: str) -> str:
    """Return the end of a dead server's log: from the engine's own failure on, else after the last sign of health.

    What a client's request made go wrong before that is in the log as well, with a traceback like any other. A stream
    that the death has cut is logged after it, with the status that it began with: that is no sign of health.
    """
    lines = text.splitlines(keepends=True)
    healthy, failed = 0, None
    for index, line in enumerate(lines):
        if _UP.search(line):
            healthy, failed = index + 1, None
        elif failed is None and _FATAL.search(line):
            failed = index
        elif failed is None and _ANSWERED.search(line):
            healthy = index + 1
    return "".join(lines[healthy if failed is None else failed :])


def cause_of_death(text: str, returncode: int) -> str:
    """Return why a server that had been ready ended, in a line.

    Args:
        text: its log after it was last known to be healthy.
        returncode: as subprocess gives it, negative for a signal.
    """
    words = last_words(text)
    lines = "; ".join(decisive_lines(words, limit=2))
    if returncode >= 0:
        return f"vLLM ended by itself (exit status {returncode}): {lines or 'its log says nothing of it'}"
    names = {int(each): each.name for each in signal.Signals}
    how = f"vLLM was killed ({names.get(-returncode, f'signal {-returncode}')})"
    if _FATAL.search(words):
        return f"{how}: {lines}"
    # Nobody who is killed says why: what is in the log is about something else.
    return f"{how}: the kernel does that when memory runs out (dmesg)" if returncode == _SIGKILL else how


def decisive_lines(text: str, limit: int = 4) -> list[str]:
    """Pick the lines of a log that say why vLLM died: the final lines of its tracebacks, each once, the cause first.

    vLLM's processes repeat one another's tracebacks; what only says that another process failed is left out unless
    there is nothing else. Without a traceback, the last lines of the log.
    """
    lines = [_PREFIX.sub("", _ANSI.sub("", line)).rstrip() for line in _plain(text)]
    found: list[str] = []
    for index, line in enumerate(lines):
        if _ARGUMENT_ERROR.match(line):
            found.append(line.partition("error: ")[2])
        elif _WORKER_DIED.match(line):
            found.append(line)
        elif _EXCEPTION.match(line):
            found.append(" ".join([line, *_indented(lines[index + 1 : index + 6])]))
    unique = list(dict.fromkeys(found))
    firsthand = [line for line in unique if not _SECONDHAND.search(line)] or unique
    chosen = firsthand[:limit] or [line for line in lines if line.strip()][-limit:]
    return [line if len(line) <= 400 else line[:400] + " ..." for line in chosen]


def _plain(text: str) -> Iterator[str]:
    """Yield the lines of a log as text, also where they are JSON (`serve.http.logs`)."""
    for line in text.splitlines():
        if line.startswith('{"time"'):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("logger") == "qvl.requests":
                    continue
                yield from str(entry["message"]).splitlines()
                yield from str(entry.get("traceback", "")).splitlines()
                continue
        yield line


def _indented(following: list[str]) -> list[str]:
    """Return the continuation of an exception's message, as pydantic writes it."""
    message = []
    for line in following:
        if not line.startswith("  ") or line.strip().startswith(("For further information", "File ")):
            break
        message.append(line.strip().partition(" [type=")[0])
    return message


_OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|No available memory for the cache|KV cache is needed|available KV cache memory"
    r"|less than desired (?:GPU|CPU) memory|is less than requested memory|Cannot allocate memory"
    r"|can't allocate memory|std::bad_alloc|MemoryError",
    re.IGNORECASE,
)
#: What helps, by what the log says. The first that matches.
_REMEDIES = (
    (
        _OUT_OF_MEMORY,
        "It ran out of memory: give a smaller --max-model-len, --max-num-seqs or --gpu-memory-utilization, "
        "stop what else uses the memory, or quantize the model.",
    ),
    (
        re.compile(r"exceeds dimension size|size mismatch|shape mismatch|AssertionError: Tried to load weights"),
        "The weights do not have the shapes that config.json promises: check the directory with `qvl inspect`.",
    ),
    (
        re.compile(r"Address already in use|address in use", re.IGNORECASE),
        "Another program took the port meanwhile: give another --port.",
    ),
    (
        re.compile(r"unrecognized arguments|invalid choice|expected one argument|argument -"),
        "The arguments after -- are vLLM's: see what the installed release takes in `vllm serve --help=all`.",
    ),
)
_SIGKILL, _SIGILL = -9, -4


def explain(log: Path, returncode: int | None, phase: str, start: int = 0) -> QvlError:
    """Return the error to raise for a vLLM that died while booting.

    Args:
        log: its log file.
        returncode: as subprocess gives it, negative for a signal; None when unknown.
        phase: what it was doing.
        start: bytes at the log's beginning that tell of an earlier boot.
    """
    text = read_from(log, start)
    lines = decisive_lines(text)
    joined = "\n".join(lines)
    remedy = next((advice for pattern, advice in _REMEDIES if pattern.search(joined)), None)
    how = f"exit status {returncode}"
    if returncode == _SIGKILL:
        how = "killed by the system"
        remedy = "The kernel kills the largest process when memory runs out: free memory, or serve a smaller model."
    elif returncode == _SIGILL:
        how = "illegal instruction"
        remedy = "This vLLM was built for a CPU with other instructions (AVX-512): install a build for this one."
    elif returncode is not None and returncode < 0:
        how = f"signal {-returncode}"
    message = f"vLLM died while {phase} ({how}). Its log says:\n"
    message += "".join(f"  {line}\n" for line in lines)
    message += f"{remedy}\n" if remedy else ""
    message += f"The whole log is {log}"
    memory = returncode == _SIGKILL or _OUT_OF_MEMORY.search(joined)
    return ResourceError(message) if memory else ServerError(message)
