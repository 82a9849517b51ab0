"""Writing a checkpoint so that it is there whole or not at all.

Everything goes to a hidden sibling of the final directory, on the same file system, and is renamed when complete.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.weights import INDEX_NAME, SINGLE_NAME, read_weights
from toolkit.errors import CheckpointError, ResourceError
from toolkit.files import free_bytes, fsync, lock, put_in_place, write_synced

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "AtomicDirectory",
    "CheckpointWriter",
    "Shard",
    "disk_space",
    "side_files",
    "weight_file_names",
]

DEFAULT_SHARD_BYTES = 4 * 2**30

_SIDE_SUFFIXES = {".json", ".txt", ".jinja", ".model", ".tiktoken"}
_SIDE_PREFIXES = ("LICENSE", "LICENCE", "NOTICE")
#: JSON files that belong to the weights, to training, or to this toolkit, and would be wrong beside new weights.
_NOT_SIDE = {
    "config.json",
    "qvl.json",
    "quant_config.json",
    "quantize_config.json",
    "adapter_config.json",
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "training.json",
    "accuracy.json",
}


def side_files(directory: Path) -> list[Path]:
    """List what a checkpoint carries beside config and weights: processor, tokenizer, generation config, chat
    templates and licence. Weights, README, training state and quantization manifests are left out.
    """
    files = [
        p
        for p in sorted(directory.iterdir())
        if p.is_file()
        and p.name not in _NOT_SIDE
        and not p.name.endswith(".index.json")
        and not p.name.startswith((".", "README"))
        and (p.suffix in _SIDE_SUFFIXES or p.name.upper().startswith(_SIDE_PREFIXES))
    ]
    return files + sorted((directory / "additional_chat_templates").glob("*.jinja"))


class AtomicDirectory(ABC):
    """A checkpoint directory that appears at once: its files are written to ``tmp``, then that is renamed to ``out``.

    What `CheckpointWriter` and the quantizer's journal have in common: when ``out`` may be taken, how files and shards
    are written, and how the finished directory is put in place.

    Args:
        out: the directory to make. One that exists and is not empty is refused, unless ``force`` is set and it is
            a checkpoint (holds config.json or qvl.json): then it is replaced in one move at the end.
        force: replace an existing checkpoint.
        max_shard_bytes: upper bound of a weight file's tensors, in bytes; one larger tensor gets a file of its own.
        source: a directory that is read meanwhile; ``out`` must not be that directory or around it.
        expected_bytes: what will be written in all; when the disk has less, fail now and not in an hour.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        force: bool = False,
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        source: Path | None = None,
        expected_bytes: int | None = None,
    ) -> None:
        self.out = Path(out).expanduser().resolve()
        self.force = force
        self.max_shard_bytes = max_shard_bytes
        self.source = source
        self.expected_bytes = expected_bytes
        #: Where files are written until the end.
        self.tmp = self.out.parent / f".{self.out.name}.qvl-tmp-{os.getpid()}"
        self._old = self.out.parent / f".{self.out.name}.qvl-old"
        self._shard = Shard()
        self._shards = 0
        self._names: set[str] = set()
        self._written = 0

    def set_config(self, config: dict[str, Any]) -> None:
        """Write config.json."""
        self.write_json("config.json", config)

    def write_json(self, name: str, obj: Any) -> None:
        """Write ``obj`` as an indented JSON file called ``name``."""
        self.write_text(name, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 text file called ``name``."""
        self._write(Path(name), text.encode())

    def copy_side_files(self, src: Path) -> list[str]:
        """Copy processor, tokenizer, generation config, chat templates and licence from ``src``; return their names."""
        files = side_files(src)
        for file in files:
            self._write(file.relative_to(src), file.read_bytes())  # follows the symbolic links of a hub cache
        return [str(file.relative_to(src)) for file in files]

    def _write(self, relative: Path, data: bytes) -> None:
        with self._space(len(data), str(relative)):
            (self.tmp / relative).parent.mkdir(exist_ok=True)
            write_synced(self.tmp / relative, data)

    def _add(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise ValueError(f"tensor {name} was added twice")
        if self._shard.tensors and self._shard.nbytes + tensor.numel() * tensor.element_size() > self.max_shard_bytes:
            self._flush()
        self._names.add(name)
        self._shard.add(name, tensor)

    def _flush(self) -> None:
        """Write the pending tensors as the next shard, under a provisional name until their number is known."""
        if not self._shard.tensors:
            return
        path = self._shard_path(self._shards + 1)
        with self._space(self._shard.nbytes, f"weight file {self._shards + 1}"):
            self._shard.save(path)
        self._shards += 1
        self._written += path.stat().st_size
        self._shard = Shard()

    def _shard_path(self, number: int) -> Path:
        return self.tmp / f"shard-{number:05d}.safetensors"

    def _name_weights(self, files: list[Path]) -> None:
        """Move all ``files`` of a directory to ``tmp``, under their final names and with an index.

        The moves come last, for they need no space: a full disk leaves ``files`` where they are.
        """
        names = dict(zip(files, weight_file_names(len(files)), strict=True))
        if len(files) > 1:
            tensors = sorted(read_weights(files[0].parent).values(), key=lambda t: t.name)
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in tensors)},
                "weight_map": {t.name: names[t.file] for t in tensors},
            }
            self.write_json(INDEX_NAME, index)
        for file, name in names.items():
            file.rename(self.tmp / name)

    def _put_in_place(self) -> None:
        """Rename the complete ``tmp`` to ``out``."""
        if not (self.tmp / "config.json").exists():
            raise ValueError("a checkpoint without config.json was about to be written")
        self.check_out()  # it may have appeared meanwhile
        try:
            fsync(self.tmp)
            put_in_place(self.tmp, self.out, self._old)
            fsync(self.out.parent)
        except OSError as error:
            raise CheckpointError(
                f"{self.out} can't be put in place: {error.strerror or error}. Is it a mount point, or in use?"
            ) from error

    def check_out(self) -> None:
        """Raise CheckpointError when ``out`` can't be taken."""
        if self.source is not None:
            source = self.source.resolve()
            if self.out == source or self.out in source.parents:
                raise CheckpointError(f"{self.out} is (or holds) the source {source}: choose another output directory.")
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise CheckpointError(f"{self.out} exists and is not a directory: choose another output directory.")
        if not any(self.out.iterdir()):
            return
        is_checkpoint = (self.out / "config.json").exists() or (self.out / "qvl.json").exists()
        if not is_checkpoint:
            raise CheckpointError(
                f"{self.out} is not empty and not a checkpoint, so it is never replaced: "
                "choose another output directory, or empty it yourself."
            )
        if not self.force:
            raise CheckpointError(f"{self.out} exists already: choose another output directory, or add --force.")

    def _clean_stale(self) -> None:
        """Remove what a killed run left: its directories are those nobody holds a lock on."""
        for tmp in self.out.parent.glob(f".{_glob_escape(self.out.name)}.qvl-tmp-*"):
            lock = _lock_directory(tmp)
            if lock is not None:
                shutil.rmtree(tmp, ignore_errors=True)
                os.close(lock)
        if self._old.exists():
            if self.out.exists():
                shutil.rmtree(self._old, ignore_errors=True)
            else:
                self._old.rename(self.out)  # killed between the two renames: the old one is all there is
                self.check_out()

    def _space(self, needed: int, what: str) -> contextlib.AbstractContextManager[None]:
        return disk_space(needed, f"{what} of {self.out}", self.out.parent, self._aftermath())

    @abstractmethod
    def _aftermath(self) -> str:
        """Return what a full disk leaves behind and what to do, to end the message with."""


class CheckpointWriter(AtomicDirectory):
    """Write a checkpoint directory, sharded and all at once.

        with CheckpointWriter(out) as writer:
            writer.add("model.embed_tokens.weight", tensor)
            writer.set_config(config)
            writer.copy_side_files(source)

    Leaving the block renames the finished directory to ``out``; an exception (or Ctrl-C) removes every trace instead.
    Tensors are kept on the CPU until a shard is full, then written and dropped: at most ``max_shard_bytes`` plus one
    tensor are held. Arguments as for `AtomicDirectory`.

    Raises CheckpointError when ``out`` can't be taken, ResourceError when the disk is full.
    """

    _lock: int | None = None

    def __enter__(self) -> CheckpointWriter:
        self.check_out()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._clean_stale()
            with self._space(self.expected_bytes or 0, "the checkpoint"):
                self.tmp.mkdir()
        except OSError as error:
            raise CheckpointError(f"{self.out} can't be written: {error.strerror or error}.") from error
        self._lock = _lock_directory(self.tmp)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._shard = Shard()
            shutil.rmtree(self.tmp, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, not to be changed afterwards; it goes to the CPU now and to disk when its shard is full."""
        self._add(name, tensor)

    def _finish(self) -> None:
        self._flush()
        if not self._shards:
            raise ValueError("a checkpoint without tensors was about to be written")
        self._name_weights([self._shard_path(number) for number in range(1, self._shards + 1)])
        self._put_in_place()

    def _aftermath(self) -> str:
        written = f" after {self._written:,} bytes written" if self._written else ""
        return f"{written}. Nothing was left behind. Free some space or choose another output directory."


class Shard:
    """Tensors on the CPU, each in memory of its own, on their way into one weight file."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        #: Bytes of the tensors.
        self.nbytes = 0
        self._pointers: set[int] = set()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, not to be changed afterwards."""
        size = tensor.numel() * tensor.element_size()
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != size or tensor.data_ptr() in self._pointers:
            tensor = tensor.clone()  # safetensors takes no shared memory, and a view would keep its whole alive
        self._pointers.add(tensor.data_ptr())
        self.tensors[name] = tensor
        self.nbytes += size

    def save(self, path: Path) -> None:
        """Write the weight file, to be on the disk on return; equal tensors give equal bytes. Raises OSError."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(self.tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            # The Rust side reports errno in words only.
            code = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
            raise OSError(code, str(error)) from error
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
        fsync(path)


def weight_file_names(count: int) -> list[str]:
    """Return the names of a checkpoint's ``count`` weight files, in order."""
    return [SINGLE_NAME] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


@contextlib.contextmanager
def disk_space(needed: int, what: str, place: Path, aftermath: str) -> Iterator[None]:
    """Write ``what`` of ``needed`` bytes below ``place`` in the block, with errors a user can read.

    Raises ResourceError, ending with ``aftermath``, when the disk is too full before or in the block; CheckpointError
    for any other OSError.
    """

    def full() -> ResourceError:
        free = free_bytes(place)
        return ResourceError(f"disk full: {what} needs {needed:,} bytes and {place} has {free:,} free{aftermath}")

    try:
        if free_bytes(place) < needed:
            raise full()
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full() from error
        raise CheckpointError(f"{what} can't be written: {error.strerror or error}.") from error


def _lock_directory(path: Path) -> int | None:
    """Lock a directory for the life of this process; None where another holds it or the file system can't lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if lock(descriptor, wait=False):
            return descriptor
    os.close(descriptor)
    return None


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
