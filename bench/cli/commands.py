"""This project's commands, shown as they would be typed and run as processes of their own."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence

__all__ = ["run"]


def run(command: Sequence[object], module: str = "toolkit.cli") -> int:
    """Show ``python -m MODULE COMMAND`` (`qvl COMMAND` for the command line), run it, and return its exit status."""
    from toolkit.console import err

    words = [str(word) for word in command]
    program = "qvl" if module == "toolkit.cli" else f"python -m {module}"
    err.print(f"$ {program} {shlex.join(words)}", style="cyan", highlight=False, markup=False, soft_wrap=True)
    return subprocess.call([sys.executable, "-m", module, *words])
