"""Killed, interrupted and repeated quantizations of the embedded model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.short import calibration, short_demo
from tests.support.tiny import files
from toolkit.errors import CheckpointError
from toolkit.quantize import layer_writer, quantize

#: Kills `quantize` at random moments, time and again, then lets it finish. In a process of its own, which has imported
#: everything and forks: a fresh start for each kill would be seconds of imports.
KILLER = """
    import os, random, shutil, signal, sys, time
    from pathlib import Path
    import torch
    from toolkit.compat import patch_torchvision
    from toolkit.quantize import quantize, run
    from toolkit.quantize.search import moments
    from toolkit.quantize.stream import shell
    patch_torchvision()
    import transformers.models.qwen2_vl.modeling_qwen2_vl
    source, calib, out, kills, effort = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    torch.set_num_threads(1)

    def start(to):
        pid = os.fork()
        if pid == 0:
            quantize(source, to, calib=calib, effort=effort)
            os._exit(0)
        return pid

    began = time.monotonic()
    assert os.waitpid(start(out / "whole"), 0)[1] == 0
    longest = time.monotonic() - began
    rng, done, resumed, ended = random.Random(0), 0, 0, 0
    while done < kills:
        pid = start(out / "killed")
        time.sleep(rng.uniform(0, longest))
        if os.waitpid(pid, os.WNOHANG)[0]:  # it was faster: once more from the start
            ended += 1
            shutil.rmtree(out / "killed")
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
        resumed += bool(list(out.glob(".killed.qvl-partial/parts-*/layer-*.safetensors")))
    if not (out / "killed").exists():
        assert os.waitpid(start(out / "killed"), 0)[1] == 0
    print(f"{done} kills, {resumed} of them with layers finished, {ended} runs that ended before theirs")
"""


#: Kills `quantize` at one of its boundaries after the other, each time the call that goes on from the last kill.
BOUNDARIES = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from toolkit.compat import patch_torchvision
    from toolkit.quantize import journal, layer_writer, quantize, run
    patch_torchvision()
    import transformers.models.qwen2_vl.modeling_qwen2_vl
    source, calib, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)

    def die_at(owner, name, call, after):
        original, calls = getattr(owner, name), []
        def dying(*args, **options):
            calls.append(name)
            if len(calls) < call:
                return original(*args, **options)
            if after:
                original(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(owner, name, dying)

    def started(to, *hook):
        pid = os.fork()
        if pid == 0:
            if hook:
                die_at(*hook)
            quantize(source, to, calib=calib, balance="modality")
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    Journal = journal.Journal
    hooks = {
        "values-read": (run, "refuse_values", 1, True),
        "journal-begun": (Journal, "__enter__", 1, True),
        "sensitivity-measured": (Journal, "once", 1, True),
        "rest-written": (Journal, "add_rest", 1, True),
        "first-layer": (layer_writer, "write_layer", 1, True),
        "last-layer": (layer_writer, "write_layer", 1, True),
        "layers-and-rest": (run, "write_rest", 1, False),
        "qvl-json": (Journal, "write_text", 2, True),
        "all-but-the-rename": (Journal, "_put_in_place", 1, False),
    }
    assert started(out / "whole") == 0
    for name, hook in hooks.items():
        assert started(out / "killed", *hook) == -signal.SIGKILL, name
    assert started(out / "killed") == 0
"""


def same_but_for_what_was_measured(a: Path, b: Path) -> bool:
    ours, theirs = files(a), files(b)
    return ours.keys() == theirs.keys() and {n for n in ours if ours[n] != theirs[n]} <= {"qvl-run.json"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration(tmp_path_factory.mktemp("calibration"))


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.release)])
def test_kills_at_random_moments_change_no_byte(kills: int, effort: str, tmp_path: Path, manifest: Path) -> None:
    source, out = short_demo(tmp_path / "in", layers=4), tmp_path / "out"
    out.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(KILLER), str(source), str(manifest), str(out)]
    done = subprocess.run([*command, str(kills), effort], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(f"{kills} kills")
    assert " 0 of them with layers finished" not in done.stdout
    # killed after the last rename, a run leaves its empty work directory to the next
    assert not list(out.glob(".*/**/*.safetensors"))
    assert same_but_for_what_was_measured(out / "killed", out / "whole")


@pytest.mark.slow
def test_a_kill_at_each_boundary_changes_no_byte(tmp_path: Path) -> None:
    source, out, few = short_demo(tmp_path / "in", layers=2), tmp_path / "out", calibration(tmp_path / "few", samples=2)
    out.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(BOUNDARIES), str(source), str(few), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "whole" / "qvl.json").read_text())["vision_sensitivity"] is not None
    assert same_but_for_what_was_measured(out / "killed", out / "whole")


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_another_number_of_threads_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, manifest = short_demo(tmp_path / "in", layers=2), calibration(tmp_path / "few", samples=2)
    write, wrote = layer_writer.write_layer, []

    def once(*args: Any) -> None:
        if wrote:
            raise KeyboardInterrupt
        wrote.append(args[1])
        write(*args)

    with threads(1):
        quantize(str(source), tmp_path / "whole", calib=str(manifest))
        monkeypatch.setattr(layer_writer, "write_layer", once)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(source), tmp_path / "stopped", calib=str(manifest))
    monkeypatch.undo()
    with threads(2):
        quantize(str(source), tmp_path / "stopped", calib=str(manifest))
        assert torch.get_num_threads() == 2
    assert "going on with 1 threads, as it was begun, instead of 2" in capsys.readouterr().err
    assert same_but_for_what_was_measured(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_the_best_effort_goes_on_from_layers_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GEMV, and with a linear in 16 bits: all that a layer's file may hold is read back to the bit."""
    source, manifest = short_demo(tmp_path / "in", layers=3), calibration(tmp_path / "few", samples=4)
    write, settings = layer_writer.write_layer, {"effort": "best", "format": "gemv", "skip": r"1\.self_attn\.o_proj"}

    def until_the_last(*args: Any) -> None:
        if args[1] == 2:
            raise KeyboardInterrupt
        write(*args)

    with threads(1):
        quantize(str(source), tmp_path / "whole", calib=str(manifest), **settings)
        monkeypatch.setattr(layer_writer, "write_layer", until_the_last)
        with pytest.raises(KeyboardInterrupt):
            quantize(str(source), tmp_path / "stopped", calib=str(manifest), **settings)
        monkeypatch.undo()
        quantize(str(source), tmp_path / "stopped", calib=str(manifest), **settings)
    assert same_but_for_what_was_measured(tmp_path / "stopped", tmp_path / "whole")
    manifested = json.loads((tmp_path / "whole" / "qvl.json").read_text())
    assert manifested["recipe"]["effort"] == "best" and manifested["recipe"]["scaling"] == "none"
    choices = {choice for layer in manifested["layers"] for choice in layer["choices"].values()}
    assert "asymmetric" in choices and choices <= {"asymmetric", "symmetric", "plain rounding"}


def started(source: Path, out: Path, manifest: Path) -> subprocess.Popen[str]:
    """Start `qvl quantize` and return it when its first layer is done."""
    command = [sys.executable, "-m", "toolkit.cli", "quantize", "--model", str(source), "--calib", str(manifest)]
    process = subprocess.Popen(
        [*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if line.startswith("layer 0"):
            return process
    raise AssertionError(f"it ended before a layer was done:\n{seen}")


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_going_on_works(tmp_path: Path, manifest: Path) -> None:
    source, out = short_demo(tmp_path / "in", layers=5), tmp_path / "out" / "q"
    with started(source, out, manifest) as process:
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in told and "Traceback" not in told
    assert "of 5 layers are kept: run the same command again to go on" in told
    assert [path.name for path in out.parent.iterdir()] == [".q.qvl-partial"]
    with pytest.raises(CheckpointError, match=r"recipe\.group_size was 128, now 64.*--restart"):
        quantize(str(source), out, calib=str(manifest), group_size=64)
    os.utime(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"source\.files\.model\.safetensors\.mtime_ns was"):
        quantize(str(source), out, calib=str(manifest))
    quantize(str(source), out, calib=str(manifest), restart=True)
    assert [path.name for path in out.parent.iterdir()] == ["q"]
