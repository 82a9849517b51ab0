"""Quantizing that can be killed: every finished decoder layer is on the disk, and the same command goes on from there.

A layer's result depends on nothing but the source and the settings, so layers made before and after a kill, or by
several processes, are those of an undisturbed run. All is kept in a hidden sibling of the output directory:

    .OUT.qvl-partial/
        lock                        held while a run lasts
        identity.json               what the layers were made from
        parts-DIGEST/               named by the identity: what a stray worker of another run writes is not ours
            layer-00007.json        a layer's record, there before
            layer-00007.safetensors its tensors
            rest-00001.safetensors  all that is not a decoder layer
            rest.json               how many of those there are, written last
        checkpoint/                 what becomes OUT in one rename; a resumed run begins it anew
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    AtomicDirectory,
    Shard,
    disk_space,
    weight_file_names,
)
from toolkit.errors import CheckpointError
from toolkit.files import fsync, lock, replacing, unlock, write_synced

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Journal", "file_stamps", "source_identity", "write_layer"]

_LAYER_FILE = re.compile(r"layer-(\d{5})\.safetensors")
#: Changed settings named in an error; a source copied anew changes all its files.
_SHOWN_CHANGES = 8


def source_identity(checkpoint: Checkpoint) -> dict[str, dict[str, int]]:
    """Return size (bytes) and mtime_ns of config.json and each weight file, by name: equal stamps, equal source."""
    files = {checkpoint.path / "config.json", *(t.file for t in checkpoint.tensors.values())}
    return file_stamps(files)


def file_stamps(files: Iterable[Path]) -> dict[str, dict[str, int]]:
    """Return size (bytes) and mtime_ns of files, by name."""
    stats = {file.name: file.stat() for file in sorted(files)}
    return {name: {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns} for name, stat in stats.items()}


def write_layer(directory: Path, index: int, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    """Add a finished decoder layer to a journal; once this returns, neither a kill nor a power cut undoes it.

    Any process may call it, several at a time for different layers.

    Args:
        directory: the journal's `directory`.
        index: number of the layer, from 0.
        tensors: the layer's tensors by their full names, on any device. Their order does not matter.
        record: deterministic facts on the layer, JSON-able; see `Journal.records`.

    Raises CheckpointError when ``directory`` is gone or can't be written, ResourceError when the disk is full.
    """
    shard = Shard()
    for name, tensor in tensors.items():
        shard.add(name, tensor)
    with disk_space(shard.nbytes, f"layer {index}", directory, _kept(len(_layer_files(directory)))):
        # The record first: a layer counts when its weight file is there.
        with replacing(directory / f"layer-{index:05d}.json", durable=True) as path:
            write_synced(path, json.dumps(record).encode())
        with replacing(directory / f"layer-{index:05d}.safetensors", durable=True) as path:
            shard.save(path)


class Journal(AtomicDirectory):
    """Write a quantized checkpoint layer by layer, going on where an earlier run with the same identity was stopped.

        with Journal(out, identity, layers=28) as journal:
            journal.add_rest(tensors)
            for index in set(range(28)) - journal.done:
                write_layer(journal.directory, index, *make(index))
            journal.set_config(config)
            journal.write_json("qvl.json", {"layers": journal.records()})

    Leaving the block puts the checkpoint in place: the rest's weight files, then one a layer, with an index. Leaving
    it by an exception keeps all that is finished for the next run if that is a layer at least, else leaves no trace.
    Killed at any moment, even while the checkpoint is put in place, the same calls end in the same bytes. (After the
    last rename ``out`` is there, and refused as any existing checkpoint is.)

    Args:
        out, force, max_shard_bytes, source, expected_bytes: as for `CheckpointWriter`.
        identity: nested JSON-able dict of all that the weights follow from: source, recipe, calibration, ...
        layers: number of decoder layers.
        environment: flat JSON-able dict of what may change the last bit, such as versions and device; see `notes`.
        restart: discard what an earlier run finished.

    Raises CheckpointError when ``out`` can't be taken, another run writes it, or the identity is not that of the
    layers found; ResourceError when the disk is full.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        identity: dict[str, Any],
        *,
        layers: int,
        force: bool = False,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        source: Path | None = None,
        expected_bytes: int | None = None,
        environment: dict[str, Any] | None = None,
        restart: bool = False,
    ) -> None:
        super().__init__(out, force, max_shard_bytes=max_shard_bytes, source=source, expected_bytes=expected_bytes)
        self.layers = layers
        self.environment: dict[str, Any] = json.loads(json.dumps(environment or {}))
        self.restart = restart
        #: Layers finished by an earlier run.
        self.done: frozenset[int] = frozenset()
        #: After the block: how many layers are kept for the next run; 0 when it is finished or there is none.
        self.kept = 0
        #: What the user should know about resuming here.
        self.notes: list[str] = []
        #: The hidden directory that holds it all; its name is the same for every run on ``out``.
        self.work = self.out.parent / f".{self.out.name}.qvl-partial"
        self._identity: dict[str, Any] = json.loads(json.dumps({**identity, "layers": layers}))
        #: Where `write_layer` puts layers.
        self.directory = self._parts(self._identity)
        self._trash = self.tmp
        self.tmp = self.work / "checkpoint"
        self._lock: int | None = None

    def __enter__(self) -> Journal:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock = self._take()
            self._begin()
        except OSError as error:
            raise CheckpointError(f"{self.out} can't be written: {error.strerror or error}.") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        finished = False
        try:
            if kind is None:
                self._finish()
                finished = True
        finally:
            self._shard = Shard()
            self._leave(finished)

    @property
    def complete(self) -> bool:
        """Whether all layers and the rest are on the disk."""
        return self._rest() is not None and set(range(self.layers)) <= self._finished()

    def add_rest(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all that is not a decoder layer; when an earlier run did, ``tensors`` is not touched."""
        if self._rest() is not None:
            return
        for path in self.directory.glob("rest-*"):
            path.unlink()  # a killed run's, which may have made shards of another size
        for name, tensor in tensors:
            self._add(name, tensor)
        self._flush()
        with self._space(0, "rest.json"), replacing(self.directory / "rest.json", durable=True) as path:
            write_synced(path, json.dumps({"files": self._shards}).encode())

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all finished layers, in the layers' order."""
        return [json.loads(self._record_path(index).read_bytes()) for index in sorted(self._finished())]

    def _parts(self, identity: dict[str, Any]) -> Path:
        canonical = json.dumps(identity, sort_keys=True).encode()
        return self.work / f"parts-{hashlib.blake2b(canonical, digest_size=8).hexdigest()}"

    def _record_path(self, index: int) -> Path:
        return self.directory / f"layer-{index:05d}.json"

    def _shard_path(self, number: int) -> Path:
        return self.directory / f"rest-{number:05d}.safetensors"

    def _finished(self) -> set[int]:
        """Return the layers whose weights and record are whole."""
        files = _layer_files(self.directory)
        return {i for i, file in files.items() if _is_whole(file) and _read_json(self._record_path(i)) is not None}

    def _rest(self) -> list[Path] | None:
        """Return the weight files of the rest, or None when it is not whole."""
        listing = _read_json(self.directory / "rest.json")
        if listing is None:
            return None
        files = [self._shard_path(number) for number in range(1, listing["files"] + 1)]
        return files if all(_is_whole(file) for file in files) else None

    def _take(self) -> int:
        """Make the work directory if there is none, and lock it."""
        path = self.work / "lock"
        while True:
            self.work.mkdir(exist_ok=True)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:
                continue  # the run that held it removed the directory in this moment
            try:
                # A file, because network file systems lock no directory.
                mine = lock(descriptor, wait=False)
            except OSError:
                self.notes.append(f"the file system of {self.out} has no locks: start no second run on it meanwhile")
                return descriptor
            if not mine:
                os.close(descriptor)
                raise CheckpointError(
                    f"another run is writing {self.out}: wait until it ends, or choose another output directory."
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor
            os.close(descriptor)  # removed between opening and locking

    def _begin(self) -> None:
        try:
            found = self._recover()
        except BaseException:
            self._unlock()
            raise
        try:
            self._clean_stale()
            self.check_out()
            self._resume(found)
        except BaseException:
            self._leave()
            raise

    def _recover(self) -> dict[str, Any] | None:
        """Return an earlier run's identity.json, if any; undo what it did towards putting the checkpoint in place."""
        path = self.work / "identity.json"
        found = _read_json(path)
        if found is not None:
            self.directory = self._parts(found["identity"])
            self._undo_finish(found["identity"]["layers"])
        elif path.exists() and not self.restart:
            raise CheckpointError(f"{path} is damaged: add --restart to begin anew.")
        return found

    def _resume(self, found: dict[str, Any] | None) -> None:
        """Take up what was found, or begin anew where that holds no layer or is not wanted."""
        environments: list[dict[str, Any]] = []
        if found is not None and not self.restart and (done := self._finished()):
            self._refuse_changes(found["identity"])
            self.done = frozenset(done)
            environments = found["environments"]
            self._note_environment(environments)
        elif found is None or self.restart or found["identity"] != self._identity:
            self._wipe()
        self.directory = self._parts(self._identity)
        shutil.rmtree(self.tmp, ignore_errors=True)
        for path in self.directory.glob("*.tmp-*"):
            path.unlink(missing_ok=True)
        there = sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))
        with self._space(max((self.expected_bytes or 0) - there, 0), "the checkpoint"):
            if self.environment not in environments:
                environments = [*environments, self.environment]
            identity = {"identity": self._identity, "environments": environments}
            with replacing(self.work / "identity.json", durable=True) as path:
                write_synced(path, json.dumps(identity, indent=2).encode())
            self.directory.mkdir(exist_ok=True)
            self.tmp.mkdir()
            fsync(self.work)
            fsync(self.out.parent)

    def _refuse_changes(self, before: dict[str, Any]) -> None:
        then, now = dict(_flatten(before)), dict(_flatten(self._identity))
        changes = [
            f"{key} was {_show(then, key)}, now {_show(now, key)}"
            for key in sorted({*then, *now})
            if _show(then, key) != _show(now, key)
        ]
        if not changes:
            return
        more = [f"and {len(changes) - _SHOWN_CHANGES} more"] if len(changes) > _SHOWN_CHANGES else []
        raise CheckpointError(
            f"an earlier run finished {len(self._finished())} layers of {self.out} from something else: "
            + "; ".join(changes[:_SHOWN_CHANGES] + more)
            + ". Repeat the earlier command to go on with it, or add --restart to discard its layers."
        )

    def _note_environment(self, environments: list[dict[str, Any]]) -> None:
        now = self.environment
        for key in sorted({*now, *(key for before in environments for key in before)}):
            others = {_show(before, key) for before in environments} - {_show(now, key)}
            if others:
                self.notes.append(
                    f"the {len(self.done)} layers so far were made with {key} {' and '.join(sorted(others))}, "
                    f"now it is {_show(now, key)}: the files may differ in the last bit from those of a single run"
                )

    def _weight_files(self, layers: int) -> list[Path]:
        """Return where the weight files wait, in the order of their final names."""
        listing = _read_json(self.directory / "rest.json") or {"files": 0}
        rest = [self._shard_path(number) for number in range(1, listing["files"] + 1)]
        return rest + [self._record_path(index).with_suffix(".safetensors") for index in range(layers)]

    def _finish(self) -> None:
        if not self.complete:
            raise ValueError("a checkpoint without all its layers and the rest was about to be written")
        self._name_weights(self._weight_files(self.layers))
        self._put_in_place()

    def _undo_finish(self, layers: int) -> None:
        files = self._weight_files(layers)
        for file, name in zip(files, weight_file_names(len(files)), strict=True):
            if (self.tmp / name).exists():
                (self.tmp / name).rename(file)

    def _leave(self, finished: bool = False) -> None:
        """Keep the work directory if it holds a layer that is still wanted, else remove it; then unlock it."""
        try:
            self._undo_finish(self.layers)
            if not finished and any(_layer_files(parts) for parts in self.work.glob("parts-*")):
                self.kept = len(self._finished())
            else:
                # Renamed first: a run that starts now must not get a directory that is being removed.
                self.work.rename(self._trash)
                shutil.rmtree(self._trash, ignore_errors=True)
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            unlock(self._lock)
            self._lock = None

    def _wipe(self) -> None:
        """Empty the work directory, and keep its lock."""
        for path in self.work.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "lock":
                path.unlink()

    def _aftermath(self) -> str:
        return _kept(len(_layer_files(self.directory)))


def _layer_files(directory: Path) -> dict[int, Path]:
    found = ((_LAYER_FILE.fullmatch(path.name), path) for path in directory.glob("layer-*.safetensors"))
    return {int(match[1]): path for match, path in found if match}


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file has the size that its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, FileNotFoundError):
        return False


def _read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is none, or only half of one."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _flatten(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a nested dict with their dotted paths."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _show(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "not there"


def _kept(layers: int) -> str:
    """Return what follows a full disk's figures, with ``layers`` finished."""
    if not layers:
        return ". Nothing was left behind. Free some space or choose another output directory."
    noun = "The finished layer is" if layers == 1 else f"The {layers} finished layers are"
    return f". {noun} kept: free some space and run the same command again to go on."
