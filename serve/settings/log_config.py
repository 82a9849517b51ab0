"""The configuration of vLLM's logging for `--log-format json`: what VLLM_LOGGING_CONFIG_PATH names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.files import write_whole

__all__ = ["write_config"]

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
    write_whole(path, text)
    return path
