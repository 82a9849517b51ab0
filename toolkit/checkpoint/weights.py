"""Weight files as found in a directory: which tensors they hold, and whether every file is whole.

Only headers are read (https://github.com/huggingface/safetensors#format: eight bytes of header length, a JSON header,
the tensors' bytes), so opening a 70 GB checkpoint costs milliseconds and no torch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import CheckpointError

__all__ = ["DTYPE_BYTES", "INDEX_NAME", "LFS_MAGIC", "SINGLE_NAME", "TensorInfo", "read_json", "read_weights"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: Bytes an element takes, by the dtype names of safetensors.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}

#: What download tools leave beside, or in place of, a file that is not whole yet.
_PARTIAL = ("*.incomplete", "*.part", "*.aria2", "*.crdownload")
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
#: How a Git-LFS pointer begins.
LFS_MAGIC = b"version https://git-lfs"
#: A header beyond this is no header; safetensors itself refuses more.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as its file's header describes it."""

    name: str
    #: safetensors' name of the dtype: "F16", "BF16", "I32", ...
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    #: Where the tensor's bytes begin, counted from the start of the file.
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements (of packed int32 words, for a packed tensor)."""
        return math.prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with or without a byte order mark.

    Raises CheckpointError naming file, line and column when it is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. "
            "The file is damaged or half-written: copy or download it again."
        ) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text, so it can't be JSON: copy or download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object: it is the wrong file.")
    return value


def read_weights(directory: Path) -> dict[str, TensorInfo]:
    """Describe all tensors of ``directory``, by name.

    The files are those the index names, else ``model.safetensors``, else all ``*.safetensors``.
    Raises CheckpointError when a file is missing, truncated, a Git-LFS pointer or a download in progress, when a tensor
    is in two files, and when an index stands beside a ``model.safetensors`` that says something else: transformers
    reads the one and vLLM the other.
    """
    _refuse_partial_downloads(directory)
    index = directory / INDEX_NAME
    if index.exists():
        return _read_indexed(directory, index)
    if (directory / SINGLE_NAME).exists():
        files = [directory / SINGLE_NAME]
    else:
        files = sorted(p for p in directory.glob("*.safetensors") if not p.name.startswith("adapter"))
        _refuse_missing_numbers(directory, files)
    if not files:
        raise CheckpointError(_no_weights(directory))
    tensors = _read_headers(files)
    if not tensors:
        raise CheckpointError(f"{directory} holds safetensors files without a single tensor: download it again.")
    return tensors


def _read_indexed(directory: Path, index: Path) -> dict[str, TensorInfo]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index} has no usable weight_map (tensor name -> file): download it again.")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (directory / name).exists()]
    beside = (directory / SINGLE_NAME).exists() and SINGLE_NAME not in names
    if missing and beside:
        raise CheckpointError(
            f"{directory} holds a {SINGLE_NAME}, and an {INDEX_NAME} whose file {missing[0]} is missing: "
            "transformers reads the one and vLLM the other. Delete the index if that one file is the model."
        )
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"{directory} is half-downloaded: {len(missing)} of the {len(names)} weight files named in {INDEX_NAME} "
            f"are missing ({shown}). Finish the download, or copy the missing files there."
        )
    tensors = _read_headers([directory / name for name in names])
    absent = sorted(set(weight_map) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{directory}: {INDEX_NAME} names {len(absent)} tensors that no file holds, such as {absent[0]}. "
            "Index and weight files come from different downloads: download the model again."
        )
    if beside and (odd := _difference(tensors, _read_header(directory / SINGLE_NAME))) is not None:
        raise CheckpointError(
            f"{directory} holds two models: {SINGLE_NAME} and the files of {INDEX_NAME} differ in {odd}. "
            "transformers reads the one and vLLM the other: delete what is older."
        )
    return tensors


def _read_headers(files: list[Path]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file.parent}: {name} is in two files, {tensors[name].file.name} and {file.name}. "
                    "They come from different saves: delete what is older, or download the model again."
                )
            tensors[name] = tensor
    return tensors


def _difference(a: dict[str, TensorInfo], b: dict[str, TensorInfo]) -> str | None:
    """Return the first tensor in which two models differ, None where they are equal to the byte."""
    odd = next(iter(sorted(a.keys() ^ b.keys())), None)
    if odd is not None:
        return odd
    return next((name for name in a if not _equal(a[name], b[name])), None)


def _equal(a: TensorInfo, b: TensorInfo, chunk: int = 8 * 2**20) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    try:
        with a.file.open("rb") as one, b.file.open("rb") as other:
            one.seek(a.offset)
            other.seek(b.offset)
            sizes = (min(chunk, a.nbytes - start) for start in range(0, a.nbytes, chunk))
            return all(one.read(size) == other.read(size) for size in sizes)
    except OSError as error:
        raise CheckpointError(f"{a.file.parent} can't be read: {error.strerror or error}.") from error


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(64)
            if start.startswith(LFS_MAGIC):
                raise CheckpointError(
                    f"{file} is a Git-LFS pointer of {size} bytes, not the weights: "
                    "run `git lfs pull` in the repository it was cloned from."
                )
            length = int.from_bytes(start[:8], "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{file} ({size:,} bytes) is truncated or not a safetensors file: {_AGAIN}")
            stream.seek(8)
            header = json.loads(stream.read(length))
        tensors = {n: _tensor_info(n, v, file, 8 + length) for n, v in header.items() if n != "__metadata__"}
    except OSError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} has a damaged safetensors header ({error}): {_AGAIN}") from error
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if size < end:
        raise CheckpointError(
            f"{file} is truncated: its header describes {end:,} bytes and the file holds {size:,}. {_AGAIN}"
        )
    if size > end:
        raise CheckpointError(f"{file} is damaged: {size - end:,} bytes follow its last tensor. {_AGAIN}")
    return tensors


_AGAIN = "Delete it and download or copy it again."


def _tensor_info(name: str, entry: dict[str, Any], file: Path, data_start: int) -> TensorInfo:
    shape = tuple(int(n) for n in entry["shape"])
    begin, end = (int(n) for n in entry["data_offsets"])
    dtype = str(entry["dtype"])
    expected = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else end - begin
    if begin < 0 or end - begin != expected:
        raise ValueError(f"tensor {name}: {dtype}{list(shape)} does not take {end - begin} bytes")
    return TensorInfo(name, dtype, shape, end - begin, file, data_start + begin)


def _refuse_partial_downloads(directory: Path) -> None:
    partial = sorted(p.name for pattern in _PARTIAL for p in directory.glob(pattern))
    if partial:
        raise CheckpointError(
            f"{directory} is half-downloaded: it holds {partial[0]}. Finish the download "
            "(or, if all files are whole, delete that leftover)."
        )


def _refuse_missing_numbers(directory: Path, files: list[Path]) -> None:
    """Shards without an index: their names still say how many there should be."""
    numbered = [(int(m[1]), int(m[2])) for f in files if (m := _NUMBERED.search(f.name))]
    total = max((n for _, n in numbered), default=0)
    missing = sorted(set(range(1, total + 1)) - {i for i, _ in numbered})
    if missing:
        raise CheckpointError(
            f"{directory} is half-downloaded: {len(missing)} of {total} weight files are missing "
            f"(number {missing[0]} first), and so is {INDEX_NAME}. Finish the download."
        )


def _no_weights(directory: Path) -> str:
    download = directory / ".cache" / "huggingface" / "download"
    if download.is_dir() and any(download.rglob("*.incomplete")):
        return f"{directory} holds no weights: its download was interrupted. Run the download again."
    for pattern, kind in (("*.gguf", "GGUF"), ("*.bin", "PyTorch pickle (.bin)"), ("*.pt", "PyTorch pickle (.pt)")):
        if any(directory.glob(pattern)):
            return (
                f"{directory} holds {kind} weights and no safetensors. Get the safetensors version of the model, "
                "or load it with transformers and save it with save_pretrained()."
            )
    return f"{directory} has a config.json but no weights (no *.safetensors file). Download or copy them there."
