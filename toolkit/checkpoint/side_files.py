"""The files beside the weights: what a server needs of tokenizer, processor and template, and whether they fit.

What transformers makes of them at load time is read off its ``Auto*`` classes: some of what is wrong it refuses, some
it replaces by something empty, and some changes what the model is shown without a word.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.weights import LFS_MAGIC, read_json
from toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.models.family import Family

__all__ = ["TEMPLATES", "chat_template", "image_settings", "side_problems", "tokens"]

#: A level, "error" or "warning", and a message.
Found = tuple[str, str]

#: Files with a chat template and nothing else.
TEMPLATES = ("chat_template.jinja", "chat_template.json")
#: Side of a patch in pixels where a file does not say it: the image processor's own.
_PATCH = 14
_IMAGES, _VIDEOS, _BOTH = "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"


def side_problems(checkpoint: Checkpoint) -> Iterator[Found]:
    """Yield what is missing, unreadable, or made for another model."""
    path = checkpoint.path
    have = {p.name for p in path.iterdir()}
    yield from _unreadable(path)
    if "tokenizer.json" not in have and not {"vocab.json", "merges.txt"} <= have:
        yield "error", "no tokenizer: tokenizer.json (or vocab.json with merges.txt) is missing"
    else:
        yield from _tokenizer(checkpoint)
    if "tokenizer_config.json" not in have:
        yield "error", "no tokenizer_config.json: special tokens and the tokenizer's class are unknown"
    yield from _processor(checkpoint)
    if not have & set(TEMPLATES) and chat_template(path) is None:
        yield "error", "no chat template: chat_template.json, chat_template.jinja or one in tokenizer_config.json"
    if "generation_config.json" not in have:
        yield "warning", "no generation_config.json: engines fall back on config.json's end-of-text token"


def _unreadable(path: Path) -> Iterator[Found]:
    for file in sorted(path.iterdir()):
        if not file.is_file() or file.suffix not in (".json", ".txt", ".jinja"):
            continue
        with file.open("rb") as stream:
            start = stream.read(len(LFS_MAGIC))
        if start == LFS_MAGIC:
            yield "error", f"{file.name} is a Git-LFS pointer, not the file: run `git lfs pull`"
            continue
        if file.suffix == ".json" and start.startswith(codecs.BOM_UTF8):
            yield (
                "error",
                f"{file.name} begins with a byte order mark, at which transformers and vLLM stop: save it without",
            )
        if file.suffix == ".json":
            try:
                read_json(file)
            except CheckpointError as error:
                yield "error", str(error)


def _read(file: Path) -> dict[str, Any]:
    """Return a JSON file's object, empty where there is none; `_unreadable` names what can't be read."""
    try:
        return read_json(file)
    except CheckpointError:
        return {}


def chat_template(path: Path) -> str | None:
    """Return the template that a directory's chats are written with, None where there is none that can be read."""
    jinja = path / TEMPLATES[0]
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8", errors="replace")
    for name in (TEMPLATES[1], "tokenizer_config.json"):
        found = _read(path / name).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def tokens(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Return the ids of a directory's vocabulary, and of the tokens that were added to it; empty where not there."""
    tokenizer = _read(path / "tokenizer.json")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        vocabulary = _read(path / "vocab.json")
    added = {str(token): number for token, number in _added(path, tokenizer) if isinstance(number, int)}
    return {token: number for token, number in vocabulary.items() if isinstance(number, int)}, added


def image_settings(path: Path) -> tuple[str, dict[str, Any] | None]:
    """Return where a directory says how images are prepared, and what it says; None: nowhere."""
    nested = _read(path / _BOTH).get("image_processor")
    if isinstance(nested, dict):  # which transformers prefers
        return f"{_BOTH}: image_processor", nested
    return _IMAGES, _read(path / _IMAGES) if (path / _IMAGES).exists() else None


def _processor(checkpoint: Checkpoint) -> Iterator[Found]:
    """Look at the image processor: its kind, and what it must have in common with the vision tower."""
    path = checkpoint.path
    videos = any((path / name).exists() for name in (_VIDEOS, _IMAGES))
    videos = videos or isinstance(_read(path / _BOTH).get("video_processor"), dict)
    name, found = image_settings(path)
    if found is not None and not videos:
        yield "error", f"{_BOTH} has no video_processor, without which transformers loads none of it"
    if found is None:
        yield "error", f"no image processor: {_IMAGES} (or {_BOTH} with an image_processor) is missing"
        return
    known = checkpoint.family.image_processors
    kind = found.get("image_processor_type", known[0])
    if kind not in known:
        yield "error", f"{name} is of a {kind}, and a {checkpoint.family.title} has a {known[0]}: copy its base's"
        return
    vision = checkpoint.vision
    for key, size, default in (
        ("patch_size", vision.patch, _PATCH),
        ("merge_size", vision.merge, vision.merge),
        ("temporal_patch_size", vision.frames, vision.frames),
    ):
        if found.get(key, default) != size:
            said = f"has {key} {found[key]}" if key in found else f"does not say {key}, which is {default} then"
            yield "error", f"{name} {said}, and the vision tower has {size}: copy the file of its base"
    yield from _bounds(name, found, checkpoint.family)


def _bounds(name: str, found: dict[str, Any], family: Family) -> Iterator[Found]:
    """Look at an image's bounds in pixels: min_pixels and max_pixels, or shortest_edge and longest_edge of ``size``."""
    size = found.get("size")
    given = dict(size) if isinstance(size, dict) else {} if size is None else {"shortest_edge": size}
    bounds = []
    for edge, pixels in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        value = found.get(pixels)
        value = given.get(edge) if value is None else value
        if value is None and size is not None:
            yield (
                "error",
                f"{name} has a size without {edge}, which transformers and vLLM need: "
                f"write min_pixels and max_pixels instead ({family.min_pixels} and {family.max_pixels} as published)",
            )
            return
        bounds.append(value)
    least, most = bounds
    for value in bounds:
        if value is not None and (not isinstance(value, int) or value < 1):
            yield "error", f"{name} bounds images by {value!r}, which is no number of pixels"
            return
    if least is not None and most is not None and least > most:
        yield "error", f"{name} bounds images from {least} to {most} pixels: no size is within that"


def _tokenizer(checkpoint: Checkpoint) -> Iterator[Found]:
    """Look at the ids of tokens: within the embeddings, and those of images as config.json says them."""
    path, rows = checkpoint.path, int(checkpoint.text_config["vocab_size"])
    ids, added = tokens(path)
    beyond = {token: number for token, number in {**ids, **added}.items() if number >= rows}
    if beyond:
        token = min(beyond, key=lambda key: beyond[key])
        yield (
            "error",
            f"the tokenizer has {len(beyond)} tokens beyond the model's {rows} embeddings, such as {token!r} "
            f"({beyond[token]}): it belongs to another save of the model",
        )
    for key, (token, default) in checkpoint.family.vision_tokens.items():
        said = checkpoint.config.get(key, default)
        if added and added.get(token, ids.get(token)) != said:
            has = f"has it as {added.get(token, ids.get(token))}" if token in {**ids, **added} else "does not have it"
            yield "error", f"config.json takes {said} for {token} ({key}), and the tokenizer {has}"


def _added(path: Path, tokenizer: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the tokens that were added to the vocabulary, wherever they are written down, with their ids."""
    listed = tokenizer.get("added_tokens")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict):
            yield entry.get("content"), entry.get("id")
    yield from _read(path / "added_tokens.json").items()
    decoder = _read(path / "tokenizer_config.json").get("added_tokens_decoder")
    for number, entry in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(entry, dict) and str(number).isdigit():
            yield entry.get("content"), int(number)
