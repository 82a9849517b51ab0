"""A checkpoint appears whole or not at all, and nobody's files are deleted by accident."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.checkpoint.writer import side_files
from toolkit.errors import CheckpointError, ResourceError


def write(out: Path, *, force: bool = False, seed: int = 0, **options: int) -> None:
    with CheckpointWriter(out, force, **options) as writer:
        for name, tensor in tiny.tensors(seed=seed).items():
            writer.add(name, tensor)
        writer.set_config(tiny.config())


def leftovers(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if ".qvl-" in p.name)


def test_one_file_and_no_index(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    write(out)
    assert sorted(tiny.files(out)) == ["config.json", "model.safetensors"]
    assert leftovers(out.parent) == []
    written = Checkpoint.open(out)
    assert all(torch.equal(written.get(name), tensor) for name, tensor in tiny.tensors().items())


def test_shards_keep_to_the_bound_and_are_indexed(tmp_path: Path) -> None:
    write(tmp_path / "out", max_shard_bytes=100_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [s.name for s in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    written = Checkpoint.open(tmp_path / "out")
    for shard in shards:
        inside = [t.nbytes for t in written.tensors.values() if t.file == shard]
        assert sum(inside) <= 100_000 or len(inside) == 1
    assert all(torch.equal(written.get(name), tensor) for name, tensor in tiny.tensors().items())
    index = (tmp_path / "out" / "model.safetensors.index.json").read_text()
    assert f'"total_size": {written.nbytes}' in index


def test_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, max_shard_bytes=100_000)
    assert tiny.files(tmp_path / "a") == tiny.files(tmp_path / "b")


def test_views_and_shared_memory_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("model.layers.0.mlp.a", whole)
        writer.add("model.layers.0.mlp.b", whole)
        writer.add("model.layers.0.mlp.c", whole.t())
        writer.add("model.layers.0.mlp.d", whole[1])
        writer.set_config(tiny.config())
    written = Checkpoint.open(tmp_path / "out")
    assert torch.equal(written.get("model.layers.0.mlp.b"), whole)
    assert torch.equal(written.get("model.layers.0.mlp.c"), whole.t())
    assert torch.equal(written.get("model.layers.0.mlp.d"), whole[1])
    assert written.nbytes == 4 * (12 * 3 + 4)


def test_files_can_be_read_as_the_umask_allows(tmp_path: Path) -> None:
    write(tmp_path / "out")
    mask = os.umask(0)
    os.umask(mask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~mask for p in (tmp_path / "out").iterdir())
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_side_files_are_what_a_server_needs(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "src", shards=2)
    wanted = ["LICENSE", "chat_template.jinja", "merges.txt", "spiece.model", "additional_chat_templates/tools.jinja"]
    unwanted = [
        "README.md",
        "pytorch_model.bin",
        "qvl.json",
        "trainer_state.json",
        "adapter_config.json",
        ".hidden.json",
    ]
    (source / "additional_chat_templates").mkdir()
    for name in wanted + unwanted:
        (source / name).write_text(name)
    expected = sorted([*tiny.SIDE_FILES, *wanted])
    assert sorted(str(p.relative_to(source)) for p in side_files(source)) == expected
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("model.layers.0.mlp.x", torch.zeros(1))
        writer.set_config(tiny.config())
        assert sorted(writer.copy_side_files(source)) == expected
    copied = tiny.files(tmp_path / "out")
    assert all(copied[name] == (source / name).read_bytes() for name in expected)
    assert set(copied) == {*expected, "config.json", "model.safetensors"}


def test_side_files_behind_links_are_copied(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "src" / "tokenizer.json").symlink_to(tmp_path / "blob")
    with CheckpointWriter(tmp_path / "out") as writer:
        writer.add("model.layers.0.mlp.x", torch.zeros(1))
        writer.set_config(tiny.config())
        writer.copy_side_files(tmp_path / "src")
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failure(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), CheckpointWriter(tmp_path / "out", max_shard_bytes=10) as writer:
        writer.add("a", torch.zeros(10))
        writer.add("b", torch.zeros(10))
        assert leftovers(tmp_path) != []
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_existing_checkpoint_alone(tmp_path: Path) -> None:
    write(tmp_path / "out")
    before = tiny.files(tmp_path / "out")
    with pytest.raises(RuntimeError), CheckpointWriter(tmp_path / "out", force=True) as writer:
        writer.add("a", torch.zeros(10))
        raise RuntimeError
    assert tiny.files(tmp_path / "out") == before
    assert leftovers(tmp_path) == []


def test_half_a_checkpoint_is_never_put_in_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without config\.json"), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.zeros(1))
    with pytest.raises(ValueError, match="without tensors"), CheckpointWriter(tmp_path / "out") as writer:
        writer.set_config({})
    with pytest.raises(ValueError, match="added twice"), CheckpointWriter(tmp_path / "out") as writer:
        writer.add("a", torch.zeros(1))
        writer.add("a", torch.zeros(1))
    assert list(tmp_path.iterdir()) == []


class TestExistingOut:
    def test_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path / "out")
        before = tiny.files(tmp_path / "out")
        with pytest.raises(CheckpointError, match=r"out exists already: choose another.*--force"):
            write(tmp_path / "out", seed=1)
        assert tiny.files(tmp_path / "out") == before

    def test_is_replaced_by_force(self, tmp_path: Path) -> None:
        write(tmp_path / "out")
        (tmp_path / "out" / "old.txt").touch()
        write(tmp_path / "out", seed=1, force=True)
        assert sorted(tiny.files(tmp_path / "out")) == ["config.json", "model.safetensors"]
        written = Checkpoint.open(tmp_path / "out")
        assert torch.equal(written.get("model.norm.weight"), tiny.tensors(seed=1)["model.norm.weight"])
        assert leftovers(tmp_path) == []

    def test_is_taken_when_empty(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        write(tmp_path / "out")
        Checkpoint.open(tmp_path / "out")

    @pytest.mark.parametrize("force", [False, True])
    def test_a_users_files_are_never_replaced(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years")
        with pytest.raises(CheckpointError, match="not empty and not a checkpoint"):
            write(tmp_path / "out", force=force)
        assert (tmp_path / "out" / "thesis.tex").read_text() == "years"

    @pytest.mark.parametrize("force", [False, True])
    def test_a_file_is_refused(self, tmp_path: Path, force: bool) -> None:
        (tmp_path / "out").write_text("x")
        with pytest.raises(CheckpointError, match="exists and is not a directory"):
            write(tmp_path / "out", force=force)

    @pytest.mark.parametrize("out", ["src", "."])
    def test_the_source_is_never_replaced(self, tmp_path: Path, out: str) -> None:
        source = tiny.write(tmp_path / "src")
        tiny.write_json(tmp_path / "config.json", {})
        with (
            pytest.raises(CheckpointError, match=r"is \(or holds\) the source"),
            CheckpointWriter(tmp_path / out, force=True, source=source),
        ):
            pass
        Checkpoint.open(source)

    def test_what_appears_meanwhile_is_kept(self, tmp_path: Path) -> None:
        with (
            pytest.raises(CheckpointError, match="exists already"),
            CheckpointWriter(tmp_path / "out") as writer,
        ):
            writer.add("a", torch.zeros(1))
            writer.set_config({})
            tiny.write(tmp_path / "out")
        Checkpoint.open(tmp_path / "out")

    def test_a_link_keeps_pointing_there(self, tmp_path: Path) -> None:
        write(tmp_path / "real")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        write(tmp_path / "link", seed=1, force=True)
        assert (tmp_path / "link").is_symlink()
        assert torch.equal(
            Checkpoint.open(tmp_path / "real").get("model.norm.weight"), tiny.tensors(seed=1)["model.norm.weight"]
        )


class TestKilled:
    def start(self, out: Path) -> subprocess.Popen[str]:
        """Start a process that is in the middle of writing ``out``."""
        script = (
            "import sys, time, torch\n"
            "from toolkit.checkpoint.checkpoint import CheckpointWriter\n"
            "with CheckpointWriter(sys.argv[1], max_shard_bytes=10) as writer:\n"
            "    writer.add('a', torch.zeros(100)); writer.add('b', torch.zeros(100))\n"
            "    print('writing', flush=True); time.sleep(60)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    def test_no_out_appears_and_the_next_run_cleans_up(self, tmp_path: Path) -> None:
        process = self.start(tmp_path / "out")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "out").exists()
        assert len(leftovers(tmp_path)) == 1
        write(tmp_path / "out")
        assert leftovers(tmp_path) == []

    def test_a_living_runs_files_are_left_alone(self, tmp_path: Path) -> None:
        process = self.start(tmp_path / "out")
        try:
            before = leftovers(tmp_path)
            write(tmp_path / "out")
            assert leftovers(tmp_path) == before
        finally:
            process.kill()
            process.communicate()

    def test_killed_between_the_two_renames(self, tmp_path: Path) -> None:
        write(tmp_path / ".out.qvl-old")  # the replaced checkpoint, moved away; the new one never arrived
        with pytest.raises(CheckpointError, match="exists already"):
            write(tmp_path / "out", seed=1)
        assert torch.equal(
            Checkpoint.open(tmp_path / "out").get("model.norm.weight"), tiny.tensors()["model.norm.weight"]
        )
        write(tmp_path / "out", seed=1, force=True)
        assert leftovers(tmp_path) == []


class TestFullDisk:
    @pytest.fixture
    def disk(self, tmp_path: Path) -> Iterator[Path]:
        """A disk of 1 MB."""
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        try:
            mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            mounted = False
        if not mounted:
            pytest.skip("a small tmpfs can only be mounted by root")
        try:
            yield disk
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def test_is_seen_before_a_shard_is_written(self, disk: Path) -> None:
        message = r"disk full: weight file 1 of .*/out needs 4,000,000 bytes and .* has 1,\d{3},\d{3} free.*left behind"
        with pytest.raises(ResourceError, match=message), CheckpointWriter(disk / "out") as writer:
            writer.add("a", torch.zeros(1_000_000))
            writer.set_config({})
        assert list(disk.iterdir()) == []

    def test_after_some_shards(self, disk: Path) -> None:
        message = r"weight file 5 of .* needs 240,000 bytes and .* after 9\d\d,\d{3} bytes written"
        with (
            pytest.raises(ResourceError, match=message),
            CheckpointWriter(disk / "out", max_shard_bytes=250_000) as writer,
        ):
            for i in range(10):
                writer.add(str(i), torch.zeros(60_000))
            writer.set_config({})
        assert list(disk.iterdir()) == []

    def test_that_fills_while_writing(self, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # Somebody else takes the space between the check and the write.
        monkeypatch.setattr("toolkit.checkpoint.writer.free_bytes", lambda place: 10**9)
        with pytest.raises(ResourceError, match=r"needs 4,000,000 bytes"), CheckpointWriter(disk / "out") as writer:
            writer.add("a", torch.zeros(1_000_000))
            writer.set_config({})
        assert list(disk.iterdir()) == []

    def test_in_a_side_file(self, disk: Path) -> None:
        with pytest.raises(ResourceError, match=r"big\.txt of"), CheckpointWriter(disk / "out") as writer:
            writer.add("a", torch.zeros(1))
            writer.write_text("big.txt", "x" * 2_000_000)
        assert list(disk.iterdir()) == []

    def test_known_beforehand(self, disk: Path) -> None:
        with (
            pytest.raises(ResourceError, match=r"the checkpoint of .* needs 5,000,000 bytes"),
            CheckpointWriter(disk / "out", expected_bytes=5_000_000),
        ):
            raise AssertionError("must not start")
        assert list(disk.iterdir()) == []

    def test_the_mount_point_itself_is_no_out(self, disk: Path) -> None:
        with pytest.raises(CheckpointError, match=r"can't be put in place.*mount point"):
            write(disk)
        assert [p.name for p in disk.parent.iterdir()] == ["disk"]


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="can't be written"):
        write(tmp_path / "file" / "out")
