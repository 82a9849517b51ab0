"""Log lines as JSON, one object a line, for vLLM, uvicorn and the server's own middleware."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

__all__ = ["JsonHandler", "line", "log_uncaught", "write"]

_STDERR = 2


def line(level: str, logger: str, message: str, **more: Any) -> str:
    """Return one log line: time (UTC, ISO 8601), level, logger, message and whatever else is given."""
    now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds")
    entry = {"time": now, "level": level.lower(), "logger": logger, "message": message, **more}
    return json.dumps(entry, ensure_ascii=True, default=str)


def write(text: str) -> None:
    """Append a line to the process's log in one piece. A full disk loses the line, never the request it is about."""
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"{text}\n".encode())


class JsonHandler(logging.Handler):
    """Writes log records as such lines, straight to the file descriptor: vLLM puts prefixes before what it prints."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            more: dict[str, Any] = {
                "process": getattr(record, "vllm_process_name", None) or record.processName,
                "pid": record.process,
            }
            if record.exc_info:
                more["traceback"] = logging.Formatter().formatException(record.exc_info)
            write(line(record.levelname, record.name, record.getMessage(), **more))
        except Exception:
            self.handleError(record)


def log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Log an error that ends the process as such a line: for sys.excepthook."""
    text = "".join(traceback.format_exception(kind, error, trace))
    write(line("critical", "qvl", f"{kind.__name__}: {error}", pid=os.getpid(), traceback=text))
