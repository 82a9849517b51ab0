"""Killed, interrupted and repeated quantizations of the embedded model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.forked import fork, wait
from tests.support.short import calibration, short_demo
from tests.support.tiny import files
from toolkit.cli import main
from toolkit.errors import CheckpointError
from toolkit.quantize import layer_writer, quantize, run
from toolkit.quantize.journal import Journal

#: Where a run is killed: an object, the name of what it calls, the how manyth call, and whether after it or before.
BOUNDARIES: dict[str, tuple[Any, str, int, bool]] = {
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


def die_at(owner: Any, name: str, call: int, after: bool) -> None:
    """Have this process killed by a call of its own."""
    original, calls = getattr(owner, name), []

    def dying(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) < call:
            return original(*args, **options)
        if after:
            original(*args, **options)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


def dying(boundary: str, *args: Any, **settings: Any) -> None:
    die_at(*BOUNDARIES[boundary])
    quantize(*args, **settings)


def same_but_for_what_was_measured(a: Path, b: Path) -> bool:
    ours, theirs = files(a), files(b)
    return ours.keys() == theirs.keys() and {n for n in ours if ours[n] != theirs[n]} <= {"qvl-run.json"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration(tmp_path_factory.mktemp("calibration"))


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def imported(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All that quantizing imports, so that what is forked starts at once."""
    at = tmp_path_factory.mktemp("imported")
    with threads(1):
        quantize(str(short_demo(at / "in", halved=True)), at / "out", calib=str(manifest))


def finished(out: Path) -> list[Path]:
    """The layers that a run has finished, which go into a checkpoint named `killed`."""
    return list(out.glob(".killed.qvl-partial/parts-*/layer-*.safetensors"))


def until_killed(process: int, out: Path, seconds: float, layer: bool) -> bool:
    """Kill a run after some seconds, or as long after its first layer; return whether it was not faster."""
    while layer and not finished(out):
        if os.waitpid(process, os.WNOHANG)[0]:
            return False
        time.sleep(0.01)
    time.sleep(seconds)
    if os.waitpid(process, os.WNOHANG)[0]:
        return False
    os.kill(process, signal.SIGKILL)
    return wait(process) == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["fast", "best"])
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.release)])
def test_kills_at_random_moments_change_no_byte(
    kills: int, effort: str, tmp_path: Path, manifest: Path, imported: None
) -> None:
    source, out = str(short_demo(tmp_path / "in", layers=3, halved=True)), tmp_path / "out"
    out.mkdir()
    settings = {"calib": str(manifest), "effort": effort}
    rng, done, resumed = random.Random(0), 0, 0
    with threads(1):
        began = time.monotonic()
        assert wait(fork(quantize, source, out / "whole", **settings)) == 0
        longest = time.monotonic() - began
        while done < kills:
            process = fork(quantize, source, out / "killed", **settings)
            # one at least is killed with layers behind it
            if not until_killed(process, out, rng.uniform(0, longest / (4 if done == 0 else 1)), layer=done == 0):
                shutil.rmtree(out / "killed")  # it was faster: once more from the start
                continue
            done += 1
            resumed += bool(finished(out))
        if not (out / "killed").exists():  # it may be after the rename that it was killed
            assert wait(fork(quantize, source, out / "killed", **settings)) == 0
    assert resumed > 0
    # killed after the last rename, a run leaves its empty work directory to the next
    assert not list(out.glob(".*/**/*.safetensors"))
    assert same_but_for_what_was_measured(out / "killed", out / "whole")


@pytest.mark.slow
def test_a_kill_at_each_boundary_changes_no_byte(tmp_path: Path, imported: None) -> None:
    """Each time the call that goes on from the last kill is killed at the next boundary."""
    source, out = str(short_demo(tmp_path / "in", layers=2, halved=True)), tmp_path / "out"
    out.mkdir()
    settings = {"calib": str(calibration(tmp_path / "few", samples=2)), "balance": "modality"}
    with threads(1):
        assert wait(fork(quantize, source, out / "whole", **settings)) == 0
        for boundary in BOUNDARIES:
            assert wait(fork(dying, boundary, source, out / "killed", **settings)) == -signal.SIGKILL, boundary
        assert wait(fork(quantize, source, out / "killed", **settings)) == 0
    assert json.loads((out / "whole" / "qvl.json").read_text())["vision_sensitivity"] is not None
    assert same_but_for_what_was_measured(out / "killed", out / "whole")


@pytest.mark.slow
def test_another_number_of_threads_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, manifest = short_demo(tmp_path / "in", layers=2, halved=True), calibration(tmp_path / "few", samples=2)
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
    source, manifest = short_demo(tmp_path / "in", layers=3, halved=True), calibration(tmp_path / "few", samples=4)
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


def command(said: Path, *arguments: str) -> None:
    """Be `qvl` with these arguments, which says into a file."""
    torch.set_num_threads(1)
    sys.argv = ["qvl", *arguments]
    sys.stderr = said.open("w", buffering=1)
    main()


def interrupted(said: Path, source: Path, out: Path, manifest: Path) -> int:
    """Start `qvl quantize`, press Ctrl-C when its first layer is done, and return its status."""
    given = ["quantize", "--model", str(source), "--calib", str(manifest), "--out", str(out)]
    process = fork(command, said, *given)
    while not said.exists() or "layer 0" not in said.read_text():
        assert os.waitpid(process, os.WNOHANG)[0] == 0, f"it ended before a layer was done:\n{said.read_text()}"
        time.sleep(0.01)
    os.kill(process, signal.SIGINT)
    return wait(process)


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_going_on_works(tmp_path: Path, manifest: Path, imported: None) -> None:
    source, out = short_demo(tmp_path / "in", layers=4, halved=True), tmp_path / "out" / "q"
    assert interrupted(tmp_path / "said", source, out, manifest) == 130
    told = (tmp_path / "said").read_text()
    assert "interrupted" in told and "Traceback" not in told
    assert "of 4 layers are kept: run the same command again to go on" in told
    assert [path.name for path in out.parent.iterdir()] == [".q.qvl-partial"]
    with pytest.raises(CheckpointError, match=r"recipe\.group_size was 128, now 64.*--restart"):
        quantize(str(source), out, calib=str(manifest), group_size=64)
    os.utime(source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"source\.files\.model\.safetensors\.mtime_ns was"):
        quantize(str(source), out, calib=str(manifest))
    quantize(str(source), out, calib=str(manifest), restart=True)
    assert [path.name for path in out.parent.iterdir()] == ["q"]
