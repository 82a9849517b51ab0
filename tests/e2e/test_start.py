"""Getting started, word for word: the commands of docs/start.md, one after the other, on the embedded model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.run.boot import free_ports
from tests.support.paths import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.release]


def commands() -> list[str]:
    """The step-by-step block of the page."""
    return re.findall(r"^ {4}(qvl .+)$", (ROOT / "docs/start.md").read_text().split("## With your own model")[0], re.M)


def test_each_command_does_what_the_page_says(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "QVL_CACHE": str(tmp_path / "cache"),
    }
    said: dict[str, str] = {}
    try:
        for command in commands():
            here = command.replace("out/", f"{tmp_path}/").replace("8000", str(port))
            ran = subprocess.run(["bash", "-c", here], cwd=ROOT, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, f"{command}\n{ran.stdout}{ran.stderr}"
            said[command.split()[1]] = ran.stdout
    finally:
        subprocess.run(["qvl", "stop", "--port", str(port), "--now"], env=environment, capture_output=True)
    assert list(said) == ["quantize", "inspect", "serve", "ask", "bench", "stop"]
    assert "AWQ GEMM" in said["inspect"] and said["ask"].strip() == "5"
    assert (tmp_path / "report/report.html").is_file()
