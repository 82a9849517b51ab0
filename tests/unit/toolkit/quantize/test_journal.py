"""A quantization killed at any moment goes on where it was, and ends in the bytes of an undisturbed one."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.support import tiny
from tests.support.forked import fork, wait
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import CheckpointError, ResourceError
from toolkit.quantize.identity import source_identity
from toolkit.quantize.journal import Journal
from toolkit.quantize.parts import write_layer

LAYERS = 6
IDENTITY: dict[str, Any] = {"recipe": {"group_size": 128, "clip": True}, "calibration": "aa11", "samples": (1, 2)}


def layer_tensors(index: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(index)
    prefix = f"model.layers.{index}."
    return {
        f"{prefix}mlp.weight": torch.randint(-9, 9, (16, 4), generator=rng, dtype=torch.int32),
        f"{prefix}mlp.scales": torch.rand(4, 8, generator=rng).half(),
        f"{prefix}norm.weight": torch.rand(5, generator=rng).half(),
    }


def record(index: int) -> dict[str, Any]:
    return {"layer": index, "error": index / 7}


def rest() -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("model.embed_tokens.weight", "visual.a", "visual.b"):
        yield name, torch.full((8, 8), len(name)).half()


def run(
    out: Path,
    *,
    layers: int = LAYERS,
    pause: float = 0.0,
    stop_after: int | None = None,
    error: type[BaseException] = RuntimeError,
    identity: dict[str, Any] = IDENTITY,
    **options: Any,
) -> Journal:
    """The quantizer in small; ``stop_after`` raises ``error`` when that many layers were made."""
    with (journal := Journal(out, identity, layers=layers, max_shard_bytes=300, **options)):
        journal.add_rest(rest())
        for index in range(layers):
            if stop_after is not None and index - len(journal.done) == stop_after:
                raise error
            if index not in journal.done:
                time.sleep(pause)
                write_layer(journal.directory, index, layer_tensors(index), record(index))
        assert journal.complete
        journal.set_config(tiny.config())
        journal.write_text("README.md", "made")
        journal.write_json("qvl.json", {"layers": journal.records()})
    return journal


def stop(out: Path, after: int, **options: Any) -> None:
    """A run that fails when ``after`` layers are made."""
    with pytest.raises(RuntimeError):
        run(out, stop_after=after, **options)


def leftovers(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if ".qvl-" in p.name)


def finished(directory: Path) -> set[int]:
    """The layers that have a weight file anywhere in the hidden directory."""
    return {int(p.name[6:11]) for p in directory.glob(".*/parts-*/layer-*.safetensors")}


def moved(directory: Path) -> bool:
    """Whether weight files have their final names already."""
    return any(directory.glob(".*/checkpoint/*.safetensors"))


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was written through to the disk, in place of doing it: that takes most of the time, and kills need none."""
    paths: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: paths.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    return paths


def test_a_layer_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, synced: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (synced.append(target), rename(path, target)))
    write_layer(tmp_path, 0, layer_tensors(0), record(0))
    assert [path.name.split(".tmp")[0] for path in synced] == [
        *("layer-00000.json", "layer-00000.json", tmp_path.name),
        *("layer-00000.safetensors", "layer-00000.safetensors", tmp_path.name),
    ]
    assert [".tmp" in path.name for path in synced] == [True, False, False] * 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(out)
    return tiny.files(out)


def test_the_checkpoint(tmp_path: Path) -> None:
    journal = run(tmp_path / "deep" / "out", environment={"torch": "2.11"})
    assert leftovers(tmp_path / "deep") == []
    assert (journal.done, journal.kept, journal.notes) == (frozenset(), 0, [])
    out = tmp_path / "deep" / "out"
    weights = [f"model-{i:05d}-of-00008.safetensors" for i in range(1, 9)]
    assert sorted(tiny.files(out)) == sorted(
        ["README.md", "config.json", "qvl.json", *weights, "model.safetensors.index.json"]
    )
    expected = dict(rest())
    for index in range(LAYERS):
        expected |= layer_tensors(index)
        with safe_open(out / weights[2 + index], framework="pt") as file:  # two files hold the rest
            assert set(file.keys()) == set(layer_tensors(index))
            assert file.metadata() == {"format": "pt"}
    written = Checkpoint.open(out)
    assert set(written.tensors) == set(expected)
    assert all(torch.equal(written.get(name), tensor) for name, tensor in expected.items())
    assert f'"total_size": {written.nbytes}' in (out / "model.safetensors.index.json").read_text()
    mask = os.umask(0)
    os.umask(mask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~mask for p in out.iterdir())
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_order_of_a_layers_tensors_does_not_matter(tmp_path: Path) -> None:
    tensors = layer_tensors(0)
    write_layer(tmp_path, 0, tensors, {})
    write_layer(tmp_path, 1, dict(reversed(tensors.items())), {})
    files = tiny.files(tmp_path)
    assert files["layer-00000.safetensors"] == files["layer-00001.safetensors"]


def test_goes_on_after_an_exception(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    def none_asked() -> Iterable[tuple[str, torch.Tensor]]:
        raise AssertionError("the rest is there")
        yield

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stop_after=2, error=KeyboardInterrupt)
    assert list(tmp_path.iterdir()) == [tmp_path / ".out.qvl-partial"]
    journal = Journal(tmp_path / "out", IDENTITY, layers=LAYERS)
    with pytest.raises(RuntimeError), journal:
        assert journal.done == {0, 1}
        assert not journal.complete
        assert journal.records() == [record(0), record(1)]
        journal.add_rest(none_asked())
        write_layer(journal.directory, 4, layer_tensors(4), record(4))
        assert journal.records() == [record(0), record(1), record(4)]
        journal.write_text("old.txt", "of a run that did not end")
        raise RuntimeError
    assert journal.kept == 3
    assert run(tmp_path / "out").done == {0, 1, 4}
    assert tiny.files(tmp_path / "out") == undisturbed
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_trace_without_a_layer(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        run(tmp_path / "out", stop_after=0, error=error)
    assert list(tmp_path.iterdir()) == []


def test_restart_discards(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    stop(tmp_path / "out", 3, identity={"other": 1})
    stop(tmp_path / "out", 1, restart=True)
    assert finished(tmp_path) == {0}
    assert run(tmp_path / "out", restart=True).done == set()
    assert tiny.files(tmp_path / "out") == undisturbed


def test_half_a_checkpoint_is_never_put_in_place(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="without all its layers"), Journal(tmp_path / "a", {}, layers=2) as journal:
        journal.add_rest(rest())
        write_layer(journal.directory, 1, layer_tensors(1), {})
    assert journal.kept == 1
    with pytest.raises(ValueError, match="the rest"), Journal(tmp_path / "b", {}, layers=1) as journal:
        write_layer(journal.directory, 0, layer_tensors(0), {})
    with pytest.raises(ValueError, match=r"config\.json"), Journal(tmp_path / "b", {}, layers=1) as journal:
        journal.add_rest(rest())
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    assert finished(tmp_path) == {0, 1}  # what was made is back in its place


class TestIdentity:
    def refusal(self, out: Path, identity: dict[str, Any], **options: Any) -> str:
        before = tiny.files(out.parent)
        with pytest.raises(CheckpointError) as caught:
            run(out, identity=identity, **options)
        assert tiny.files(out.parent) == before
        return str(caught.value)

    def test_changes_are_named(self, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        stop(tmp_path / "out", 2)
        changed = {"recipe": {"group_size": 64, "clip": True, "seed": 7}, "samples": [1, 2]}
        assert self.refusal(tmp_path / "out", changed) == (
            f"an earlier run finished 2 layers of {tmp_path / 'out'} from something else: "
            'calibration was "aa11", now not there; recipe.group_size was 128, now 64; '
            "recipe.seed was not there, now 7. "
            "Repeat the earlier command to go on with it, or add --restart to discard its layers."
        )
        assert run(tmp_path / "out").done == {0, 1}
        assert tiny.files(tmp_path / "out") == undisturbed

    def test_many_changes_are_counted(self, tmp_path: Path) -> None:
        stop(tmp_path / "out", 1, identity={str(i): 0 for i in range(11)})
        message = self.refusal(tmp_path / "out", {str(i): 1 for i in range(11)})
        assert message.count(" was ") == 8
        assert "; and 3 more. Repeat" in message

    def test_the_number_of_layers_is_part_of_it(self, tmp_path: Path) -> None:
        stop(tmp_path / "out", 2)
        with (
            pytest.raises(CheckpointError, match="layers was 6, now 2"),
            Journal(tmp_path / "out", IDENTITY, layers=2),
        ):
            pass

    def test_a_changed_source_file_is_named(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src", shards=2)
        before = source_identity(Checkpoint.open(source))
        assert set(before) == {"config.json", *(f"model-0000{i}-of-00002.safetensors" for i in (1, 2))}
        assert before == source_identity(Checkpoint.open(source))
        stop(tmp_path / "out", 1, identity={"source": before})
        os.utime(source / "model-00002-of-00002.safetensors", ns=(1, 1))
        message = self.refusal(tmp_path / "out", {"source": source_identity(Checkpoint.open(source))})
        assert re.search(r": source\.model-00002-of-00002\.safetensors\.mtime_ns was \d+, now 1\. ", message)

    def test_with_no_layer_there_is_nothing_to_protect(self, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        process = fork(run, tmp_path / "out", pause=60, identity={"other": 1})
        while not list(tmp_path.glob(".out.qvl-partial/parts-*/rest.json")):
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
        assert wait(process) == -signal.SIGKILL
        run(tmp_path / "out")
        assert tiny.files(tmp_path / "out") == undisturbed

    def test_damaged(self, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        stop(tmp_path / "out", 2)
        (tmp_path / ".out.qvl-partial" / "identity.json").write_text("{")
        assert "identity.json is damaged: add --restart" in self.refusal(tmp_path / "out", IDENTITY)
        assert run(tmp_path / "out", restart=True).done == set()
        assert tiny.files(tmp_path / "out") == undisturbed

    def test_a_changed_environment_is_noted(self, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        stop(tmp_path / "out", 2, environment={"torch": "2.11", "threads": 2})
        stop(tmp_path / "out", 2, environment={"torch": "2.13", "threads": 2})
        journal = run(tmp_path / "out", environment={"torch": "2.14", "threads": 2})
        assert journal.notes == [
            'the 4 layers so far were made with torch "2.11" and "2.13", now it is "2.14": '
            "the files may differ in the last bit from those of a single run"
        ]
        assert tiny.files(tmp_path / "out") == undisturbed


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        *(("layer-00001.safetensors", keep) for keep in (0, 9, -1)),
        *(("layer-00001.json", keep) for keep in (0, -1)),
        ("rest-00002.safetensors", -1),
        ("rest.json", 3),
    ],
)
def test_what_a_power_cut_damaged_is_made_again(
    tmp_path: Path, undisturbed: dict[str, bytes], name: str, keep: int
) -> None:
    stop(tmp_path / "out", 3)
    (file,) = tmp_path.glob(f".out.qvl-partial/parts-*/{name}")
    file.write_bytes(file.read_bytes()[:keep])
    assert run(tmp_path / "out").done == ({0, 2} if name.startswith("layer") else {0, 1, 2})
    assert tiny.files(tmp_path / "out") == undisturbed


class TestExistingOut:
    def test_is_refused(self, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        run(tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"exists already.*--force"):
            run(tmp_path / "out", identity={"other": 1})
        assert tiny.files(tmp_path / "out") == undisturbed
        assert leftovers(tmp_path) == []

    def test_is_replaced_by_force_at_the_very_end(self, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        tiny.write(tmp_path / "out")
        before = tiny.files(tmp_path / "out")
        stop(tmp_path / "out", 5, force=True)
        assert tiny.files(tmp_path / "out") == before
        with pytest.raises(CheckpointError, match="exists already"):
            run(tmp_path / "out")
        assert run(tmp_path / "out", force=True).done == {0, 1, 2, 3, 4}
        assert tiny.files(tmp_path / "out") == undisturbed
        assert leftovers(tmp_path) == []

    def test_what_appears_meanwhile_is_kept_and_so_are_the_layers(
        self, tmp_path: Path, undisturbed: dict[str, bytes]
    ) -> None:
        journal = Journal(tmp_path / "out", IDENTITY, layers=LAYERS, max_shard_bytes=300)
        with pytest.raises(CheckpointError, match="exists already"), journal:
            journal.add_rest(rest())
            for index in range(LAYERS):
                write_layer(journal.directory, index, layer_tensors(index), record(index))
            journal.set_config({})
            tiny.write(tmp_path / "out")
        Checkpoint.open(tmp_path / "out")
        assert journal.kept == LAYERS
        assert run(tmp_path / "out", force=True).done == set(range(LAYERS))
        assert tiny.files(tmp_path / "out") == undisturbed

    def test_the_source_is_never_replaced(self, tmp_path: Path) -> None:
        source = tiny.write(tmp_path / "src")
        with pytest.raises(CheckpointError, match="the source"):
            run(source, force=True, source=source)
        assert [p.name for p in tmp_path.iterdir()] == ["src"]
        Checkpoint.open(source)


def write_some(directory: Path, indices: list[int]) -> None:
    for index in indices:
        write_layer(directory, index, layer_tensors(index), record(index))


class TestProcesses:
    def test_a_second_run_is_refused(self, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        with pytest.raises(RuntimeError), Journal(tmp_path / "out", IDENTITY, layers=LAYERS) as journal:
            write_some(journal.directory, [0, 1])
            for restart in (False, True):
                with pytest.raises(CheckpointError, match=r"another run is writing .*/out: wait"):
                    run(tmp_path / "out", restart=restart)
            raise RuntimeError
        assert run(tmp_path / "out").done == {0, 1}
        assert tiny.files(tmp_path / "out") == undisturbed

    def test_several_write_layers(self, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        journal = Journal(tmp_path / "out", IDENTITY, layers=LAYERS, max_shard_bytes=300)
        with pytest.raises(RuntimeError), journal:
            # The third does what the others do too, as a worker does that outlived a kill.
            parts: list[list[int]] = [[0, 2, 4], [1, 3, 5], [2, 3]]
            workers = [fork(write_some, journal.directory, part) for part in parts]
            assert [wait(worker) for worker in workers] == [0, 0, 0]
            raise RuntimeError
        assert run(tmp_path / "out").done == set(range(LAYERS))
        assert tiny.files(tmp_path / "out") == undisturbed

    def test_a_worker_of_a_discarded_run_writes_nothing(self, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
        with pytest.raises(RuntimeError), Journal(tmp_path / "out", {"other": 1}, layers=LAYERS) as old:
            write_some(old.directory, [0])
            raise RuntimeError
        with pytest.raises(RuntimeError), Journal(tmp_path / "out", IDENTITY, layers=LAYERS, restart=True) as journal:
            write_some(journal.directory, [1])
            with pytest.raises(CheckpointError, match="layer 3 can't be written: No such file"):
                write_layer(old.directory, 3, {"x": torch.zeros(1)}, {})
            raise RuntimeError
        assert run(tmp_path / "out").done == {1}
        assert tiny.files(tmp_path / "out") == undisturbed

    def test_a_worker_that_comes_late_leaves_nothing(
        self, tmp_path: Path, undisturbed: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = Journal(tmp_path / "out", IDENTITY, layers=LAYERS).directory

        def late(path: Path) -> None:
            if path.name == "checkpoint":  # complete, and about to be renamed
                write_some(directory, [3])

        monkeypatch.setattr("toolkit.checkpoint.writer.fsync", late)
        run(tmp_path / "out")
        assert tiny.files(tmp_path / "out") == undisturbed
        assert leftovers(tmp_path) == []


def test_killed_at_random_moments(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    began = time.perf_counter()
    assert wait(fork(run, tmp_path / "timed", pause=0.01)) == 0
    duration = time.perf_counter() - began
    rng = random.Random(0)
    killed = 0
    for number in count():
        out = tmp_path / f"out-{number}"
        while not out.exists():
            before = finished(tmp_path)
            process = fork(run, out, pause=0.01)
            time.sleep(rng.uniform(0, duration))
            os.kill(process, signal.SIGKILL)
            code = wait(process)
            assert code in (0, -signal.SIGKILL)
            killed += code != 0
            assert out.exists() or moved(tmp_path) or finished(tmp_path) >= before
        assert tiny.files(out) == undisturbed
        if killed >= 10:
            break


class Killed(BaseException):
    """Stands for a kill: once raised, nothing more changes in the file system."""


def kill_before(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise Killed before that many names and files were made, changed or removed, and at every attempt thereafter."""
    steps = count()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if (function is not io_open or "w" in args[1]) and next(steps) >= step:
                raise Killed
            return function(*args, **options)

        return call

    io_open = io.open
    monkeypatch.setattr(io, "open", counted(io_open))
    for name in ("rename", "mkdir", "unlink", "rmdir", "chmod"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize("force", [False, True])
def test_killed_before_each_step(tmp_path: Path, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"layers": 2, "force": force}
    run(tmp_path / "undisturbed", **options)
    undisturbed = tiny.files(tmp_path / "undisturbed")
    seen = set()
    for step in count():
        out = tmp_path / str(step) / "out"
        out.parent.mkdir()
        if force:
            tiny.write(out)
        old = tiny.files(out)
        with monkeypatch.context() as context, contextlib.suppress(Killed):
            kill_before(step, context)
            run(out, **options)
            break
        there = tiny.files(out)
        assert there in (old, undisturbed) or (not there and tiny.files(out.parent / ".out.qvl-old") == old)
        before = finished(out.parent)
        moved_away = moved(out.parent)
        seen.add((len(before), moved_away, there == undisturbed))
        if there != undisturbed or force:
            assert run(out, **options).done == (before if not moved_away else {0, 1})
        else:
            with pytest.raises(CheckpointError, match="exists already"):
                run(out, **options)
        assert tiny.files(out) == undisturbed
        assert leftovers(out.parent) == []
    # (layers in their place, weight files under their final names, checkpoint in place), from the first step on
    nothing, one, two = (0, False, False), (1, False, False), (2, False, False)
    moving, moved_one, moved_both, in_place = (2, True, False), (1, True, False), (0, True, False), (0, False, True)
    assert seen == {nothing, one, two, moving, moved_one, moved_both, in_place}


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        monkeypatch.setattr("toolkit.checkpoint.writer.free_bytes", lambda place: 10)

    left = "needs .* bytes and .* has 10 free. Nothing was left behind"
    with pytest.raises(ResourceError, match=left), Journal(tmp_path / "out", {}, layers=LAYERS) as journal:
        full()
        write_layer(journal.directory, 0, layer_tensors(0), {})
    assert list(tmp_path.iterdir()) == []

    monkeypatch.undo()
    kept = r"disk full: layer 2 needs .* has 10 free. The 2 finished layers are kept: free some space and run the same"
    with pytest.raises(ResourceError, match=kept), Journal(tmp_path / "out", {}, layers=LAYERS) as journal:
        write_some(journal.directory, [0, 1])
        full()
        write_some(journal.directory, [2])
    assert journal.kept == 2

    monkeypatch.undo()
    there = sum(len(data) for name, data in tiny.files(tmp_path).items() if name.endswith(".safetensors"))
    journal = Journal(tmp_path / "out", {}, layers=LAYERS, expected_bytes=there + 11)
    full()
    with pytest.raises(ResourceError, match=r"the checkpoint of .*/out needs 11 bytes.* 2 finished layers are kept"):
        journal.__enter__()
    assert finished(tmp_path) == {0, 1}
    journal = Journal(tmp_path / "out", {}, layers=LAYERS, expected_bytes=there + 10)
    with pytest.raises(ResourceError, match=r"index\.json of .* The 6 finished layers are kept"), journal:
        monkeypatch.undo()
        journal.add_rest(rest())
        write_some(journal.directory, [2, 3, 4, 5])
        journal.set_config({})
        full()
    assert journal.kept == 6


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="can't be written"):
        run(tmp_path / "file" / "out")
