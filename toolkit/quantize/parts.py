"""Finished pieces of a checkpoint in a directory: decoder layers, and the rest. What is whole counts, nothing else.

layer-00007.json            a layer's record, there before
layer-00007.safetensors     its tensors
rest-00001.safetensors      all that is not a decoder layer
rest.json                   how many of those there are, written last
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.writer import Shard, disk_space
from toolkit.files import replacing, write_synced

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Parts", "kept_in_words", "read_json", "read_scales", "write_layer", "write_scales"]

_LAYER_FILE = re.compile(r"layer-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Parts:
    """The pieces in one directory, which need not be there."""

    directory: Path

    def record_file(self, index: int) -> Path:
        """Return where a layer's record is."""
        return self.directory / f"layer-{index:05d}.json"

    def layer_file(self, index: int) -> Path:
        """Return where a layer's tensors are."""
        return self.directory / f"layer-{index:05d}.safetensors"

    def rest_file(self, number: int) -> Path:
        """Return where a file of the rest is; the first is number 1."""
        return self.directory / f"rest-{number:05d}.safetensors"

    def layer_files(self) -> dict[int, Path]:
        """Return the layers' weight files, whole or not, by the layers' indices."""
        found = ((_LAYER_FILE.fullmatch(path.name), path) for path in self.directory.glob("layer-*.safetensors"))
        return {int(match[1]): path for match, path in found if match}

    def finished(self) -> set[int]:
        """Return the layers whose weights and record are whole."""
        files = self.layer_files()
        return {i for i, file in files.items() if _is_whole(file) and read_json(self.record_file(i)) is not None}

    def records(self) -> list[dict[str, Any]]:
        """Return the records of all finished layers, in the layers' order."""
        return [json.loads(self.record_file(index).read_bytes()) for index in sorted(self.finished())]

    def rest(self) -> list[Path] | None:
        """Return the weight files of the rest, or None when it is not whole."""
        if read_json(self.directory / "rest.json") is None:
            return None
        files = self._rest_files()
        return files if all(_is_whole(file) for file in files) else None

    def finish_rest(self, files: int) -> None:
        """Say that the rest is whole, and of so many files."""
        with replacing(self.directory / "rest.json", durable=True) as path:
            write_synced(path, json.dumps({"files": files}).encode())

    def remove_rest(self) -> None:
        """Remove what there is of the rest."""
        for path in self.directory.glob("rest-*"):
            path.unlink()

    def weight_files(self, layers: int) -> list[Path]:
        """Return where the weight files of so many layers and the rest wait, in the order of their final names."""
        return self._rest_files() + [self.layer_file(index) for index in range(layers)]

    def _rest_files(self) -> list[Path]:
        listing = read_json(self.directory / "rest.json") or {"files": 0}
        return [self.rest_file(number) for number in range(1, listing["files"] + 1)]


def write_layer(directory: Path, index: int, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
    """Add a finished decoder layer to a journal; once this returns, neither a kill nor a power cut undoes it.

    Any process may call it, several at a time for different layers.

    Args:
        directory: the journal's `directory`.
        index: number of the layer, from 0.
        tensors: the layer's tensors by their full names, on any device. Their order does not matter.
        record: deterministic facts on the layer, JSON-able; see `Parts.records`.

    Raises CheckpointError when ``directory`` is gone or can't be written, ResourceError when the disk is full.
    """
    parts = Parts(directory)
    shard = Shard()
    for name, tensor in tensors.items():
        shard.add(name, tensor)
    with disk_space(shard.nbytes, f"layer {index}", directory, kept_in_words(len(parts.layer_files()))):
        # The record first: a layer counts when its weight file is there.
        with replacing(parts.record_file(index), durable=True) as path:
            write_synced(path, json.dumps(record).encode())
        with replacing(parts.layer_file(index), durable=True) as path:
            shard.save(path)


def write_scales(directory: Path, index: int, scales: Mapping[str, Tensor]) -> None:
    """Keep what a layer's units are scaled by, [K] by unit, beside its tensors: for what is measured afterwards."""
    shard = Shard()
    for unit, values in scales.items():
        shard.add(unit, values)
    with replacing(_scales_file(directory, index), durable=True) as path:
        shard.save(path)


def read_scales(directory: Path, index: int) -> dict[str, Tensor]:
    """Return what `write_scales` kept of a layer."""
    from safetensors.torch import load_file

    return load_file(_scales_file(directory, index))


def _scales_file(directory: Path, index: int) -> Path:
    return directory / f"layer-{index:05d}.scales"  # no weight file, by its name


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is none, or only half of one."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def kept_in_words(layers: int) -> str:
    """Return what follows a full disk's figures, with ``layers`` finished."""
    if not layers:
        return ". Nothing was left behind. Free some space or choose another output directory."
    noun = "The finished layer is" if layers == 1 else f"The {layers} finished layers are"
    return f". {noun} kept: free some space and run the same command again to go on."


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file has the size that its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, FileNotFoundError):
        return False
