"""What the model is shown while it is quantized: chats become model inputs, sample by sample.

Nothing is padded or batched, so no pad token ever weighs in; all tokens of a sample count the same, whoever said them:
calibration has no labels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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

_MAX_VIDEO_FRAMES = 768  # qwen-vl-utils' own bound


@dataclass(frozen=True)
class PreparedSample:
    """Model inputs of one sample.

    ``inputs``: what the processor returns, without the attention mask (there is no padding to mask): ``input_ids``
    [1, T], ``mm_token_type_ids`` [1, T], ``pixel_values`` [patches, 1176], ``image_grid_thw`` [images, 3] and the like.
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
    wanted = float(part.get("sample_fps", 2.0))
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
            elif part["type"] == "video":
                part = _load_video(part, sample.base, sample.where)
            content.append(part)
        messages.append({**message, "content": content})
    return messages


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
                "perhaps; copy chat_template.json from the published Qwen2-VL beside the weights"
            )


def prepare(
    samples: Iterable[CalibrationSample],
    processor: Qwen2VLProcessor,
    *,
    max_tokens: int,
    max_pixels: int | None,
    skipped: Callable[[CalibrationSample, int], None] | None = None,
) -> Iterator[PreparedSample]:
    """Turn samples into model inputs, one at a time, through ``process_vision_info`` and the model's own processor.

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
    from qwen_vl_utils import process_vision_info

    template = _template(processor)
    vision_ids = [
        i
        for i in (
            processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"),
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
        try:
            images, videos, video_kwargs = process_vision_info(
                messages, return_video_kwargs=True, return_video_metadata=True
            )
        except (AssertionError, ValueError) as error:  # bounds that no size satisfies
            raise MediaError(f"{sample.where}: an image or video can't be brought to size: {error}") from None
        extra: dict[str, Any] = {}
        if videos:
            frames, metadata = zip(*videos, strict=True)
            videos, extra = list(frames), {"video_metadata": list(metadata), **video_kwargs}
        # the images have their final size already: resizing is process_vision_info's
        inputs = dict(
            processor(text=[text], images=images, videos=videos, return_tensors="pt", do_resize=False, **extra)
        )
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
