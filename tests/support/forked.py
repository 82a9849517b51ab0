"""Processes forked from the tests' own: everything is imported there already, which would take each of them seconds."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any


def fork(function: Callable[..., Any], *args: Any, **options: Any) -> int:
    """Start ``function`` in a process of its own, which ends with 0 when it returns; return the process's id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 sees torch's threads
        process = os.fork()
    if process == 0:
        try:
            function(*args, **options)
            os._exit(0)
        except SystemExit as ended:
            os._exit(ended.code if isinstance(ended.code, int) else 1)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return process


def wait(process: int) -> int:
    """Wait until a process ends; return its exit code, or -9 when it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
