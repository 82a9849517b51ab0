"""Writing a checkpoint so that it is there whole or not at all.

Everything goes to a hidden sibling of the final directory, on the same file system, and is renamed when complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from toolkit.errors import CheckpointError, ResourceError
from toolkit.weights import INDEX_NAME, SINGLE_NAME

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["DEFAULT_SHARD_BYTES", "CheckpointWriter", "side_files"]

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


class CheckpointWriter:
    """Write a checkpoint directory, sharded and all at once.

        with CheckpointWriter(out) as writer:
            writer.add("model.embed_tokens.weight", tensor)
            writer.set_config(config)
            writer.copy_side_files(source)

    Leaving the block renames the finished directory to ``out``; an exception (or Ctrl-C) removes every trace instead.
    Tensors are kept on the CPU until a shard is full, then written and dropped: at most ``max_shard_bytes`` plus one
    tensor are held.

    Args:
        out: the directory to make. One that exists and is not empty is refused, unless ``force`` is set and it is
            a checkpoint (holds config.json or qvl.json): then it is replaced in one move at the end.
        force: replace an existing checkpoint.
        max_shard_bytes: upper bound of a weight file's tensors, in bytes; one larger tensor gets a file of its own.
        source: a directory that is read meanwhile; ``out`` must not be that directory or around it.
        expected_bytes: what will be written in all; when the disk has less, fail now and not in an hour.

    Raises CheckpointError when ``out`` can't be taken, ResourceError when the disk is full.
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
        self._lock: int | None = None
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._pointers: set[int] = set()
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._written = 0
        self._total = 0

    def __enter__(self) -> CheckpointWriter:
        self._check_out()
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._clean_stale()
            self._check_space(self.expected_bytes or 0, "the checkpoint")
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
            self._pending.clear()
            shutil.rmtree(self.tmp, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, not to be changed afterwards; it goes to the CPU now and to disk when its shard is full."""
        if name in self._names:
            raise ValueError(f"tensor {name} was added twice")
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_shard_bytes:
            self._flush()
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != size or tensor.data_ptr() in self._pointers:
            tensor = tensor.clone()  # safetensors takes no shared memory, and a view would keep its whole alive
        self._names.add(name)
        self._pointers.add(tensor.data_ptr())
        self._pending[name] = tensor
        self._pending_bytes += size

    def set_config(self, config: dict[str, Any]) -> None:
        """Write config.json."""
        self.write_json("config.json", config)

    def write_json(self, name: str, obj: Any) -> None:
        """Write ``obj`` as an indented JSON file called ``name``."""
        self.write_text(name, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a UTF-8 text file called ``name``."""
        data = text.encode()
        with self._full_disk_explained(len(data), name):
            _write_synced(self.tmp / name, data)

    def copy_side_files(self, src: Path) -> list[str]:
        """Copy processor, tokenizer, generation config, chat templates and licence from ``src``; return their names."""
        names = []
        for file in side_files(src):
            relative = file.relative_to(src)
            data = file.read_bytes()  # follows the symbolic links of a hub cache
            with self._full_disk_explained(len(data), str(relative)):
                (self.tmp / relative).parent.mkdir(exist_ok=True)
                _write_synced(self.tmp / relative, data)
            names.append(str(relative))
        return names

    def _flush(self) -> None:
        """Write the pending tensors as the next shard, under a provisional name until their number is known."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if not self._pending:
            return
        path = self.tmp / f"shard-{len(self._shards) + 1:05d}"
        needed, what = self._pending_bytes, f"weight file {len(self._shards) + 1}"
        self._check_space(needed, what)
        with self._full_disk_explained(needed, what):
            try:
                save_file(self._pending, path, metadata={"format": "pt"})
            except SafetensorError as error:
                # The Rust side reports errno in words only.
                code = errno.ENOSPC if f"os error {errno.ENOSPC}" in str(error) else errno.EIO
                raise OSError(code, str(error)) from error
            path.chmod(self.tmp.stat().st_mode & 0o666)  # safetensors makes files for their owner alone
            _fsync(path)
        self._shards.append(list(self._pending))
        self._written += path.stat().st_size
        self._total += self._pending_bytes
        self._pending.clear()
        self._pointers.clear()
        self._pending_bytes = 0

    def _finish(self) -> None:
        self._flush()
        if not self._shards:
            raise ValueError("a checkpoint without tensors was about to be written")
        if not (self.tmp / "config.json").exists():
            raise ValueError("a checkpoint without config.json was about to be written")
        count = len(self._shards)
        weight_map = {}
        for i, names in enumerate(self._shards, start=1):
            final = SINGLE_NAME if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            (self.tmp / f"shard-{i:05d}").rename(self.tmp / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            self.write_json(INDEX_NAME, index)
        self._check_out()  # it may have appeared meanwhile
        try:
            _fsync(self.tmp)
            self._rename()
            _fsync(self.out.parent)
        except OSError as error:
            raise CheckpointError(
                f"{self.out} can't be put in place: {error.strerror or error}. Is it a mount point, or in use?"
            ) from error

    def _rename(self) -> None:
        if not (self.out.exists() and any(self.out.iterdir())):
            self.tmp.rename(self.out)  # also takes the place of an empty directory
            return
        shutil.rmtree(self._old, ignore_errors=True)
        self.out.rename(self._old)
        try:
            self.tmp.rename(self.out)
        except BaseException:
            self._old.rename(self.out)
            raise
        shutil.rmtree(self._old, ignore_errors=True)

    def _check_out(self) -> None:
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
                self._check_out()

    def _check_space(self, needed: int, what: str) -> None:
        if shutil.disk_usage(self.out.parent).free < needed:
            raise self._disk_full(needed, what)

    @contextlib.contextmanager
    def _full_disk_explained(self, needed: int, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full(needed, what) from error
            raise CheckpointError(f"{self.out} can't be written: {error.strerror or error}.") from error

    def _disk_full(self, needed: int, what: str) -> ResourceError:
        free = shutil.disk_usage(self.out.parent).free
        return ResourceError(
            f"disk full: {what} of {self.out} needs {needed:,} bytes and {self.out.parent} has {free:,} free"
            + (f" after {self._written:,} bytes written" if self._written else "")
            + ". Nothing was left behind. Free some space or choose another output directory."
        )


def _lock_directory(path: Path) -> int | None:
    """Lock a directory for the life of this process; None where another holds it or the file system can't lock."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
