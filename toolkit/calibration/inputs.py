"""What the model is shown while it is quantized: chats become model inputs, sample by sample.

Nothing is padded or batched, so no pad token ever weighs in; all tokens of a sample count the same, whoever said them:
calibration has no labels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.calibration import media
from toolkit.calibration.manifest import CalibrationSample
from toolkit.errors import CheckpointError, MediaError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import Qwen2VLProcessor

__all__ = ["PreparedSample", "digest", "prepare"]

_IMAGE = "<|image_pad|>"
_MAX_VIDEO_FRAMES = 768  # qwen-vl-utils' own bound
_SAMPLE_FPS = 2.0  # and its frames a second, where a list of frames says none


@dataclass(frozen=True)
class PreparedSample:
    """Model inputs of one sample.

    ``inputs``: what the processor returns, without the attention mask (there is no padding to mask): ``input_ids``
    [1, T], ``mm_token_type_ids`` [1, T], ``pixel_values`` [patches, values of a patch],
    ``image_grid_thw`` [images, 3] and the like.
    """

    inputs: dict[str, torch.Tensor]
    tokens: int
    vision_tokens: int
    where: str


def _load_image(reference: str, base: Path, where: str) -> Image:
    return media.as_shown(media.decode(media.read(reference, base, where), where, media.shorten(reference)))


def _load_video(part: dict[str, Any], base: Path, where: str) -> dict[str, Any]:
    """Return the part with its frames decoded: a list of PIL images at ``sample_fps`` frames a second."""
    video = part["video"]
    if isinstance(video, list):
        images = [_load_image(frame, base, where) for frame in video]
        other = next((image.size for image in images if image.size != images[0].size), None)
        if other:
            a, b = ("{} x {}".format(*size) for size in (images[0].size, other))
            raise MediaError(f"{where}: a video's frames are of two sizes, {a} and {b}: scale them to one")
        return {**part, "video": images}
    import cv2
    from PIL import Image

    if video.startswith(("http://", "https://", "data:")):
        raise MediaError(f"{where}: a video must be a local file or a list of frames")
    path = media.local_path(video, base)
    if not path.is_file():
        raise MediaError(f"{where}: no file at {path}")
    if any(key in part for key in ("fps", "nframes", "min_frames", "max_frames")):
        return _sampled(part, path, where)
    wanted = float(part.get("sample_fps", _SAMPLE_FPS))
    reader = cv2.VideoCapture(str(path))
    try:
        native = reader.get(cv2.CAP_PROP_FPS) or wanted
        step = max(1.0, native / wanted)
        frames: list[Image.Image] = []
        index = 0
        while len(frames) < _MAX_VIDEO_FRAMES and reader.grab():
            if index >= len(frames) * step:
                ok, pixels = reader.retrieve()
                if not ok:
                    break
                frames.append(Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)))
            index += 1
    finally:
        reader.release()
    if not frames:
        raise MediaError(f"{where}: {path} is not a video that can be decoded")
    return {**part, "video": frames, "sample_fps": native / step, "raw_fps": native}


def _sampled(part: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    """Return a video file's part with the frames that qwen-vl-utils takes for its fps, nframes, min and max_frames."""
    import cv2
    import numpy as np
    from PIL import Image
    from qwen_vl_utils.vision_process import smart_nframes

    def frames(wanted: set[int]) -> tuple[int, dict[int, Image.Image]]:
        """Count all frames and decode those that are wanted: containers lie about their number."""
        reader, count, found = cv2.VideoCapture(str(path)), 0, {}
        try:
            while reader.grab():
                if count in wanted:
                    ok, pixels = reader.retrieve()
                    if ok:
                        found[count] = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
                count += 1
            rates.append(reader.get(cv2.CAP_PROP_FPS))
        finally:
            reader.release()
        return count, found

    rates: list[float] = []
    total, _ = frames(set())
    native = rates[0] or 2.0
    if not total:
        raise MediaError(f"{where}: {path} is not a video that can be decoded")
    settings = {"fps": part["sample_fps"]} if "sample_fps" in part else {}
    settings |= {key: part[key] for key in ("fps", "nframes", "min_frames", "max_frames") if key in part}
    try:
        number = smart_nframes(settings, total_frames=total, video_fps=native)
    except (AssertionError, ValueError) as error:
        raise MediaError(f"{where}: of the {total} frames of {path}: {error}") from None
    if number > _MAX_VIDEO_FRAMES:
        raise MediaError(f"{where}: {number} frames of {path} are over {_MAX_VIDEO_FRAMES}: lower nframes or fps")
    indices = np.linspace(0, total - 1, number).round().astype(int).tolist()
    _, images = frames(set(indices))
    if len(images) < len(set(indices)):
        raise MediaError(f"{where}: {path} is not a video that can be decoded")
    rest = {key: value for key, value in part.items() if key not in ("fps", "nframes", "min_frames", "max_frames")}
    rate = number / total * native
    return {**rest, "video": [images[index] for index in indices], "sample_fps": rate, "raw_fps": native}


def _with_media(sample: CalibrationSample, bounds: dict[str, int]) -> list[dict[str, Any]]:
    """Return the sample's messages with every image and video decoded; ``bounds`` hold for images that set none."""
    from qwen_vl_utils.vision_process import MAX_RATIO

    messages = []
    for message in sample.messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                image = _load_image(part["image"], sample.base, sample.where)
                if max(image.size) > MAX_RATIO * min(image.size):
                    raise MediaError(
                        f"{sample.where}: an image of {image.size} is over the model's 1:{MAX_RATIO} ratio"
                    )
                part = {**bounds, **part, "image": image}
                if part["min_pixels"] > part["max_pixels"]:
                    raise MediaError(
                        f"{sample.where}: an image can't be brought to size: at least {part['min_pixels']} and at most "
                        f"{part['max_pixels']} pixels"
                    )
            elif part["type"] == "video":
                part = _load_video(part, sample.base, sample.where)
            content.append(part)
        messages.append({**message, "content": content})
    return messages


def _images(
    messages: list[dict[str, Any]], processor: Qwen2VLProcessor, where: str
) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Return the images of a chat as model inputs, and the tokens that each comes to.

    Each is brought to size by the processor itself, as in a server: qwen-vl-utils, which came with the model, rounds
    thin strips to other grids and other pixels than the processor does.
    """
    import torch
    from qwen_vl_utils import fetch_image

    found: list[Mapping[str, torch.Tensor]] = []
    for part in (part for message in messages for part in message["content"] if part["type"] == "image"):
        if "resized_height" in part:
            try:
                image = fetch_image(part, image_patch_size=processor.image_processor.patch_size)
            except (AssertionError, ValueError) as error:
                raise MediaError(f"{where}: an image can't be brought to size: {error}") from None
            found.append(processor.image_processor([image], do_resize=False, return_tensors="pt"))
            continue
        size = {"shortest_edge": part["min_pixels"], "longest_edge": part["max_pixels"]}
        found.append(processor.image_processor([part["image"]], size=size, return_tensors="pt"))
    if not found:
        return {}, []
    inputs = {name: torch.cat([image[name] for image in found]) for name in ("pixel_values", "image_grid_thw")}
    merged = processor.image_processor.merge_size**2
    return inputs, [int(grid.prod()) // merged for grid in inputs["image_grid_thw"]]


def _videos(
    messages: list[dict[str, Any]], processor: Qwen2VLProcessor, where: str
) -> tuple[list[Any] | None, dict[str, Any]]:
    """Return a chat's videos at their final size, as the processor takes them, and what goes with them.

    What goes with them is the time between frames that are shown: later families than Qwen2-VL read it.
    """
    from qwen_vl_utils import process_vision_info

    parts = [part for message in messages for part in message["content"] if part["type"] == "video"]
    if not parts:
        return None, {}
    try:
        _, videos, settings = process_vision_info(
            [{"role": "user", "content": parts}],
            return_video_kwargs=True,
            return_video_metadata=True,
            image_patch_size=processor.image_processor.patch_size,
        )
    except (AssertionError, ValueError) as error:  # bounds that no size satisfies
        raise MediaError(f"{where}: a video can't be brought to size: {error}") from None
    frames = [shown for shown, _ in videos or []]
    # qwen-vl-utils counts the frames that it is given, and says the rate of the file that they were taken from
    rates = [float(part.get("sample_fps", _SAMPLE_FPS)) for part in parts]
    metadata = [
        {"fps": rate, "frames_indices": list(range(len(shown))), "total_num_frames": len(shown)}
        for shown, rate in zip(frames, rates, strict=True)
    ]
    return frames, {"video_metadata": metadata, **settings}


def _with_tokens(text: str, counts: Sequence[int]) -> str:
    """Return a chat's text with each image's mark repeated as often as the image has tokens."""
    first, *rest = text.split(_IMAGE)
    return first + "".join(_IMAGE * count + piece for count, piece in zip(counts, rest, strict=True))


def _template(processor: Qwen2VLProcessor) -> str | None:
    """Return the processor's chat template, or where it has none its tokenizer's, as vLLM does."""
    found = processor.chat_template or processor.tokenizer.chat_template
    return found.get("default") if isinstance(found, dict) else found


def _refuse_unseen(text: str, messages: list[dict[str, Any]], where: str) -> None:
    """Raise CheckpointError where a template has left images or videos out of a text."""
    kinds = Counter(part["type"] for message in messages for part in message["content"])
    for kind in ("image", "video"):
        shown = text.count(f"<|{kind}_pad|>")
        if shown != kinds[kind]:
            raise CheckpointError(
                f"{where}: the model's chat template shows {shown} of {kinds[kind]} {kind}s: it is a text model's, "
                "perhaps; copy the chat template of the published model beside the weights"
            )


def prepare(
    samples: Iterable[CalibrationSample],
    processor: Qwen2VLProcessor,
    *,
    max_tokens: int,
    max_pixels: int | None,
    skipped: Callable[[CalibrationSample, int], None] | None = None,
) -> Iterator[PreparedSample]:
    """Turn samples into model inputs, one at a time, through the model's own processor.

    Args:
        samples: from `toolkit.calibration.manifest.read_manifest`.
        processor: the checkpoint's ``AutoProcessor``.
        max_tokens: longer samples are left out (cutting one could cut an image in two) and told to ``skipped``.
        max_pixels: bound on an image's pixels, for parts that set none; None: the processor's own.
        skipped: called with the sample and its number of tokens.

    Raises:
        MediaError: an image or video can't be decoded.
        CheckpointError: the processor's chat template does not show images.
    """
    template = _template(processor)
    vision_ids = [
        i
        for i in (
            processor.tokenizer.convert_tokens_to_ids(_IMAGE),
            processor.tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        )
        if i is not None
    ]
    # a fine-tuned model may have its own bounds: the server will resize by them, so calibration does
    size = processor.image_processor.size
    bounds = {"min_pixels": int(size["shortest_edge"]), "max_pixels": int(size["longest_edge"])}
    if max_pixels is not None:
        bounds["max_pixels"] = max(bounds["min_pixels"], min(bounds["max_pixels"], max_pixels))
    for sample in samples:
        messages = _with_media(sample, bounds)
        text = processor.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=False
        )
        _refuse_unseen(text, messages, sample.where)
        images, counts = _images(messages, processor, sample.where)
        videos, extra = _videos(messages, processor, sample.where)
        inputs = dict(
            processor(text=[_with_tokens(text, counts)], videos=videos, return_tensors="pt", do_resize=False, **extra)
        )
        inputs |= images
        inputs.pop("attention_mask", None)  # without padding it masks nothing, and it would cost [T, T] floats a sample
        ids = inputs["input_ids"]
        if ids.shape[1] > max_tokens:
            if skipped is not None:
                skipped(sample, ids.shape[1])
            continue
        vision = sum(int((ids == i).sum()) for i in vision_ids)
        yield PreparedSample(inputs, ids.shape[1], vision, sample.where)


def digest(samples: Iterable[PreparedSample]) -> str:
    """Return a SHA-256 over everything the model is shown: equal digests mean equal calibration."""
    sha = hashlib.sha256()
    for sample in samples:
        for name in sorted(sample.inputs):
            value = sample.inputs[name]
            sha.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            sha.update(value.contiguous().numpy().tobytes())
    return sha.hexdigest()
