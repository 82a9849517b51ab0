from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import serve.ask
from serve.cli import register
from serve.process import state
from tests.support.command import called
from tests.support.fake_server import Behaviour, serving
from tests.support.serve import Start
from tests.unit.serve.http.test_images import image
from toolkit import cli
from toolkit.errors import ServerError

#: The event stream of an answer that ran into max_tokens.
CUT = b'data: {"choices":[{"index":0,"delta":{"content":"xxxx"},"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'

app = typer.Typer()
register(app)


def qvl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user's, with the verbs of all packages."""
    return called(cli.app, *arguments)


@pytest.mark.parametrize("verb", ["serve", "status", "stop", "ask"])
def test_every_option_has_a_help_text(verb: str) -> None:
    command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
    assert command.help
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, toolkit.cli; print(sorted({'torch', 'transformers', 'vllm', 'PIL', 'httpx'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "[]\n"


def test_status_and_stop(start: Start) -> None:
    result = subprocess.run([sys.executable, "-m", "toolkit.cli", "status"], capture_output=True, text=True)
    assert result.returncode == 0 and "no server is running" in result.stderr
    for port in (18140, 18141):
        state.save(start(port))
    listed = json.loads(qvl("status", "--json").stdout)
    assert [server["port"] for server in listed] == [18140, 18141]
    assert listed[0]["state"] == "booting"
    assert "18140" in qvl("status", "--port", "18140").stdout
    assert qvl("stop", "--port", "18140", "--now").stdout == "stopped m on port 18140\n"
    assert qvl("stop", "--all", "--now").stdout == "stopped m on port 18141\n"
    assert state.load_all() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status", "--port", "18140"], "no server on port 18140"),
        (["stop", "--port", "18140"], "no server on port 18140"),
        (["serve", "no/such/directory"], "no such directory"),
        (["serve", "demo", "more"], "Flags for vLLM come after --"),
        (["serve", "demo", "--backend", "tpu"], "give cpu or gpu"),
        (["serve", "demo", "--dtype", "int3"], "one of float16"),
        (["serve", "demo", "--", "--port", "1"], "use qvl's own --port"),
        (["ask", "--url", "http://127.0.0.1:18149", "Why?"], "no server answers"),
        (["ask", "--image", "nowhere.png", "Why?"], "no file at nowhere.png"),
    ],
)
def test_mistakes_are_one_message_and_exit_2(arguments: list[str], message: str) -> None:
    result = qvl(*arguments)
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert message in result.stderr and result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_keys_that_are_no_file_end_the_start_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "misspelt").write_text("hunter2 nmae=ann\n")
    for path, message in (
        (tmp_path / "pipe", "it is a pipe"),
        (tmp_path, "it is a directory"),
        (tmp_path / "empty", "holds no key"),
        (tmp_path / "misspelt", "line 1: after the key come attributes"),
    ):
        result = qvl("serve", "demo", "--api-key-file", str(path))
        assert result.returncode == 2 and result.stdout == "" and message in result.stderr
        assert "hunter" not in result.stderr and "Traceback" not in result.stderr


def test_a_start_warns_of_keys(tmp_path: Path) -> None:
    """Before anything is started; the last word of each start here is that the model has no such context."""
    (tmp_path / "keys").write_text("short\n")
    wrong = ("--max-model-len", "100000", "--log-format", "text")
    told = qvl("serve", "demo", "--api-key-file", str(tmp_path / "keys"), *wrong).stderr
    assert "warning: the key in line 1 has fewer than 16 characters" in told and "command line" not in told
    told = qvl("serve", "demo", "--api-key", "k" * 16, *wrong).stderr
    assert "--api-key on the command line can be read by every user" in told and "--api-key-file" in told
    assert "fewer than" not in told and "k" * 16 not in told


def test_ask_streams_to_stdout(tmp_path: Path) -> None:
    shown = str(image(tmp_path / "a.png", "PNG"))
    with serving(Behaviour(text=lambda body: "seven")) as server:
        assert qvl("ask", "--url", server.url, "--image", shown, "--image", shown, "How many?").stdout == "seven\n"
        printed = json.loads(qvl("ask", "--url", server.url, "--image", shown, "--json", "How many?").stdout)
    assert [part["type"] for part in server.bodies[0]["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert printed["text"] == "seven" and printed["finish_reason"] == "stop"


def test_ask_with_a_key() -> None:
    with serving(Behaviour(text=lambda body: "yes", api_key="k")) as server:
        refused = qvl("ask", "--url", server.url, "May I?")
        assert refused.returncode == 2 and "QVL_API_KEY" in refused.stderr
        shown = qvl("ask", "--url", server.url, "--api-key", "k", "May I?")
        assert shown.stdout == "yes\n"
        assert (
            "--api-key on the command line can be read by every user" in shown.stderr and "QVL_API_KEY" in shown.stderr
        )
        os.environ["QVL_API_KEY"] = "k"
        try:
            quiet = qvl("ask", "--url", server.url, "May I?")
            assert quiet.stdout == "yes\n" and "command line" not in quiet.stderr
        finally:
            del os.environ["QVL_API_KEY"]


def test_ask_finds_the_only_server(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Behaviour(text=lambda body: "here")) as server:
        known = replace(start(18141), url=server.url, ready=True)
        state.save(known)
        assert qvl("ask", "Where?").stdout == "here\n"
    state.save(replace(known, port=18140))  # two of them: which one was meant?

    def asked(url: str, *rest: Any, **settings: Any) -> None:
        raise ServerError(f"asked {url}")  # where somebody may listen who has nothing to do with these tests

    monkeypatch.setattr(serve.ask, "ask", asked)
    assert "asked http://127.0.0.1:8000" in qvl("ask", "Where?").stderr


def test_an_answer_cut_short_says_so() -> None:
    with serving(Behaviour(raw=CUT)) as server:
        result = CliRunner().invoke(app, ["ask", "--url", server.url, "--max-tokens", "4", "Why?"])
    assert result.stdout == "xxxx\n"
    assert "cut at 4 tokens" in result.stderr
