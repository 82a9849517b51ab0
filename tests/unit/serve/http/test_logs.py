from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from serve.http.logs import line
from serve.process.bootlog import decisive_lines
from serve.settings.log_config import write_config


def logged(code: str, config: Path, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose logging is configured as vLLM's would be."""
    before = f"import json, logging, logging.config; logging.config.dictConfig(json.load(open({str(config)!r})))\n"
    command = [sys.executable, "-c", before + code]
    return subprocess.run(command, stderr=stderr, stdout=subprocess.PIPE, text=True, check=True)


def test_records_of_vllm_and_uvicorn_are_json_lines(tmp_path: Path) -> None:
    config = write_config(tmp_path / "deep" / "logging.json")
    code = """
logging.getLogger("vllm.engine").info("weights %s\\nin two lines", "größer")
logging.getLogger("uvicorn.error").info("started")
logging.getLogger("uvicorn.access").info("GET /v1/models?key=secret")
logging.getLogger("transformers").info("chatter")
logging.getLogger("transformers").warning("odd")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("vllm").exception("it failed")
"""
    lines = [json.loads(text) for text in logged(code, config).stderr.splitlines()]
    assert [entry["message"] for entry in lines] == ["weights größer\nin two lines", "started", "odd", "it failed"]
    assert lines[0]["level"] == "info" and lines[0]["logger"] == "vllm.engine" and lines[0]["pid"] > 0
    assert lines[0]["time"].endswith("+00:00")
    assert lines[3]["traceback"].endswith("ZeroDivisionError: division by zero")


def test_a_full_disk_does_not_stop_who_logs(tmp_path: Path) -> None:
    config = write_config(tmp_path / "logging.json")
    with Path("/dev/full").open("w") as full:
        done = logged(
            "from serve.http.logs import write\nwrite('x')\nlogging.getLogger('vllm').error('x')\nprint('alive')",
            config,
            stderr=full.fileno(),
        )
    assert done.stdout == "alive\n"


def test_an_uncaught_error_is_one_line() -> None:
    code = "import sys\nfrom serve.http.logs import log_uncaught\nsys.excepthook = log_uncaught\nraise ValueError('no')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    (text,) = done.stderr.splitlines()
    assert json.loads(text)["message"] == "ValueError: no" and done.returncode == 1


def test_the_cause_of_a_death_is_found_in_json_lines() -> None:
    trace = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: no such dtype'
    log = "\n".join(
        [
            line("info", "vllm", "starting"),
            line("error", "vllm", "EngineCore failed to start.", traceback=trace),
            "plain text in between",
        ]
    )
    assert decisive_lines(log) == ["ValueError: no such dtype"]
