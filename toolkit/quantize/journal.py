"""Quantizing that can be killed: every finished decoder layer is on the disk, and the same command goes on from there.

A layer's result depends on nothing but the source and the settings, so layers made before and after a kill, or by
several processes, are those of an undisturbed run. All is kept in a hidden sibling of the output directory:

    .OUT.qvl-partial/
        lock                        held while a run lasts
        identity.json               what the layers were made from
        parts-DIGEST/               layers and the rest (`toolkit.quantize.parts`), and what was measured before them;
                                    named by the identity, since what a stray worker of another run writes is not ours
        checkpoint/                 what becomes OUT in one rename; a resumed run begins it anew
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from toolkit.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    AtomicDirectory,
    Shard,
    weight_file_names,
)
from toolkit.errors import CheckpointError
from toolkit.files import fsync, lock, replacing, unlock, write_synced
from toolkit.quantize.identity import changes, digest, environment_notes
from toolkit.quantize.parts import Parts, kept_in_words, read_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Journal"]

T = TypeVar("T")

#: What a run takes over from the one that it goes on with, instead of a note that bits may differ.
_TAKEN_OVER = ("threads",)


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
            In the block, "threads" is the number that the first of these runs had, and is to be used.
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
        self._parts = self._parts_of(self._identity)
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
    def directory(self) -> Path:
        """Where :func:`toolkit.quantize.parts.write_layer` puts layers."""
        return self._parts.directory

    @property
    def begun(self) -> bool:
        """Before the block: whether an earlier run with this identity was stopped, and is gone on with."""
        found = read_json(self.work / "identity.json")
        return found is not None and found.get("identity") == self._identity

    @property
    def complete(self) -> bool:
        """Whether all layers and the rest are on the disk."""
        return self._parts.rest() is not None and set(range(self.layers)) <= self._parts.finished()

    def add_rest(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write all that is not a decoder layer; when an earlier run did, ``tensors`` is not touched."""
        if self._parts.rest() is not None:
            return
        self._parts.remove_rest()  # a killed run's, which may have made shards of another size
        for name, tensor in tensors:
            self._add(name, tensor)
        self._flush()
        with self._space(0, "rest.json"):
            self._parts.finish_rest(self._shards)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return what an earlier run made under this name, or make it and keep it for a later one.

        Args:
            name: of letters.
            make: returns JSON-able lists, dicts and scalars; floats come back to the bit.
        """
        path = self.directory / f"{name}.json"
        found = read_json(path)
        if found is None:
            found = {"made": make()}
            with self._space(0, path.name), replacing(path, durable=True) as temporary:
                write_synced(temporary, json.dumps(found).encode())
        made: T = found["made"]
        return made

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all finished layers, in the layers' order."""
        return self._parts.records()

    def _parts_of(self, identity: dict[str, Any]) -> Parts:
        return Parts(self.work / f"parts-{digest(identity)}")

    def _shard_path(self, number: int) -> Path:
        return self._parts.rest_file(number)

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
        found = read_json(path)
        if found is not None:
            self._parts = self._parts_of(found["identity"])
            self._undo_finish(found["identity"]["layers"])
        elif path.exists() and not self.restart:
            raise CheckpointError(f"{path} is damaged: add --restart to begin anew.")
        return found

    def _resume(self, found: dict[str, Any] | None) -> None:
        """Take up what was found, or begin anew where that holds no layer or is not wanted."""
        environments: list[dict[str, Any]] = []
        done = self._parts.finished() if found is not None and not self.restart else set()
        if found is not None and not self.restart and (done or found["identity"] == self._identity):
            if done and (changed := changes(found["identity"], self._identity)):
                raise CheckpointError(
                    f"an earlier run finished {len(done)} layers of {self.out} from something else: {changed}. "
                    "Repeat the earlier command to go on with it, or add --restart to discard its layers."
                )
            self.done = frozenset(done)
            environments = found["environments"]
            self._take_over(environments)
            if done:
                self.notes += environment_notes(environments, self.environment, len(done))
        else:
            self._wipe()
        self._parts = self._parts_of(self._identity)
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

    def _take_over(self, environments: Sequence[dict[str, Any]]) -> None:
        """Bring this run's environment to that of an earlier one, where it can be."""
        for key in _TAKEN_OVER:
            before = next((environment[key] for environment in environments if key in environment), None)
            if key in self.environment and before not in (None, self.environment[key]):
                self.notes.append(
                    f"going on with {before} {key}, as it was begun, instead of {self.environment[key]}: "
                    "another number would change the last bit"
                )
                self.environment[key] = before

    def _finish(self) -> None:
        if not self.complete:
            raise ValueError("a checkpoint without all its layers and the rest was about to be written")
        self._name_weights(self._parts.weight_files(self.layers))
        self._put_in_place()

    def _undo_finish(self, layers: int) -> None:
        files = self._parts.weight_files(layers)
        for file, name in zip(files, weight_file_names(len(files)), strict=True):
            if (self.tmp / name).exists():
                (self.tmp / name).rename(file)

    def _leave(self, finished: bool = False) -> None:
        """Keep the work directory if it holds a layer that is still wanted, else remove it; then unlock it."""
        try:
            self._undo_finish(self.layers)
            if not finished and any(Parts(parts).layer_files() for parts in self.work.glob("parts-*")):
                self.kept = len(self._parts.finished())
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
        return kept_in_words(len(self._parts.layer_files()))
