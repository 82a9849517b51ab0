"""Log lines as JSON, one object a line, for vLLM, uvicorn and the server's own middleware."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["JsonHandler", "line", "log_uncaught", "write", "write_config"]

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


#: For logging.config.dictConfig. vLLM hands the same to uvicorn, whose access log RequestLog replaces.
_CONFIG: Mapping[str, Any] = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"json": {"class": "serve.http.logs.JsonHandler"}},
    "root": {"handlers": ["json"], "level": "WARNING"},
    "loggers": {
        **{name: {"handlers": ["json"], "level": "INFO", "propagate": False} for name in ("vllm", "uvicorn", "qvl")},
        "uvicorn.error": {"handlers": ["json"], "level": "INFO", "propagate": False},
        "uvicorn.access": {"handlers": [], "level": "CRITICAL", "propagate": False},
    },
}


def write_config(path: Path) -> Path:
    """Write the logging configuration that VLLM_LOGGING_CONFIG_PATH is to name; returns its path."""
    text = json.dumps(_CONFIG, indent=1)
    if path.exists() and path.read_text() == text:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(path)
    return path


def log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Log an error that ends the process as such a line: for sys.excepthook."""
    text = "".join(traceback.format_exception(kind, error, trace))
    write(line("critical", "qvl", f"{kind.__name__}: {error}", pid=os.getpid(), traceback=text))
