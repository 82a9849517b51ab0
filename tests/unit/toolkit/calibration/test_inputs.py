"""Calibration manifests: every form of sample that is taken, every mistake that is named."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from toolkit.calibration.inputs import digest, prepare
from toolkit.calibration.manifest import CalibrationSample, read_manifest
from toolkit.errors import ManifestError, MediaError
from toolkit.paths import demo_checkpoint


@pytest.fixture(scope="module")
def processor() -> Any:
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(demo_checkpoint())


def image(size: tuple[int, int] = (112, 140), colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


def manifest(directory: Path, *lines: object) -> Path:
    path = directory / "calib.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def chat(*parts: dict[str, Any], answer: str | None = "red") -> dict[str, Any]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [*parts, {"type": "text", "text": "What colour?"}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages}


def inputs_of(path: Path, processor: Any, **settings: Any) -> list[Any]:
    return list(prepare(read_manifest(path), processor, **{"max_tokens": 4096, "max_pixels": None, **settings}))


def test_every_way_to_name_an_image_gives_the_same_inputs(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "a b.png").write_bytes(image())
    data_url = "data:image/png;base64," + base64.b64encode(image()).decode()
    ways = [
        {"type": "image_url", "image_url": {"url": "a b.png"}},
        {"type": "image_url", "image_url": data_url},
        {"type": "image", "image": str(tmp_path / "a b.png")},
        {"type": "image", "image": (tmp_path / "a b.png").as_uri()},
        {"image": data_url},
    ]
    prepared = inputs_of(manifest(tmp_path, *[chat(way) for way in ways]), processor)
    assert len({digest([p]) for p in prepared}) == 1
    # 112 x 140 pixels are 8 x 10 patches, merged 2 x 2
    assert prepared[0].vision_tokens == 20
    assert prepared[0].inputs["pixel_values"].shape == (80, 1176)
    assert prepared[0].inputs["input_ids"].shape == (1, prepared[0].tokens)
    assert "attention_mask" not in prepared[0].inputs


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_images_from_a_url(tmp_path: Path, processor: Any, site: str) -> None:
    (tmp_path / "a.png").write_bytes(image())
    here, there = inputs_of(
        manifest(tmp_path, chat({"image": "a.png"}), chat({"image_url": {"url": f"{site}/a.png"}})), processor
    )
    assert digest([here]) == digest([there])
    with pytest.raises(MediaError, match=r"calib.jsonl:1: .*absent\.png can't be fetched .*404"):
        inputs_of(manifest(tmp_path, chat({"image": f"{site}/absent.png"})), processor)


def test_qwen_style_bare_lists_and_plain_text(tmp_path: Path, processor: Any) -> None:
    path = manifest(tmp_path, [{"role": "user", "content": "hello"}], {"text": "hello"})
    first, second = inputs_of(path, processor)
    assert digest([first]) == digest([second])
    assert first.vision_tokens == 0


def test_bounds_on_pixels(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "a.png").write_bytes(image((280, 280)))
    small = {"type": "image", "image": "a.png", "max_pixels": 56 * 56}
    path = manifest(tmp_path, chat({"image": "a.png"}), chat(small))
    assert [p.vision_tokens for p in inputs_of(path, processor)] == [100, 4]
    assert [p.vision_tokens for p in inputs_of(path, processor, max_pixels=112 * 112)] == [16, 4]


def test_a_video_as_frames_and_as_a_file(tmp_path: Path, processor: Any) -> None:
    cv2 = pytest.importorskip("cv2")
    import numpy as np

    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(image((112, 112), "red" if i < 2 else "blue"))
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 4, (112, 112))
    for i in range(8):  # two seconds
        writer.write(np.full((112, 112, 3), (0, 0, 255) if i < 4 else (255, 0, 0), np.uint8))
    writer.release()
    # video frames are never below 128 tokens' worth of pixels unless a bound says so
    bound = {"min_pixels": 112 * 112, "max_pixels": 112 * 112}
    frames = {"type": "video", "video": [f"{i}.png" for i in range(4)], **bound}
    file = {"type": "video_url", "video_url": {"url": "v.avi"}, "sample_fps": 2, **bound}
    prepared = inputs_of(manifest(tmp_path, chat(frames), chat(file)), processor)
    # 4 frames of 8 x 8 patches: 2 temporal patches of 16 merged tokens
    assert [p.inputs["video_grid_thw"].tolist() for p in prepared] == [[[2, 8, 8]]] * 2
    assert [p.vision_tokens for p in prepared] == [32, 32]


def test_a_draw_is_seeded_and_keeps_order(tmp_path: Path) -> None:
    path = manifest(tmp_path, *[{"text": str(i)} for i in range(20)])
    texts = [s.messages[0]["content"][0]["text"] for s in read_manifest(path, 5, seed=1)]
    assert texts == [s.messages[0]["content"][0]["text"] for s in read_manifest(path, 5, seed=1)]
    assert texts != [s.messages[0]["content"][0]["text"] for s in read_manifest(path, 5, seed=2)]
    assert sorted(texts, key=int) == texts and len(set(texts)) == 5


def test_long_samples_are_left_out_and_told(tmp_path: Path, processor: Any) -> None:
    path = manifest(tmp_path, {"text": "a b c " * 200}, {"text": "short"})
    told: list[tuple[str, int]] = []
    kept = list(
        prepare(
            read_manifest(path),
            processor,
            max_tokens=100,
            max_pixels=None,
            skipped=lambda sample, tokens: told.append((sample.where, tokens)),
        )
    )
    assert [k.where for k in kept] == [f"{path}:2"]
    assert told[0][0] == f"{path}:1" and told[0][1] > 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nope", "not JSON"),
        ("{}", "non-empty 'messages'"),
        ('{"messages": []}', "non-empty 'messages'"),
        ('{"messages": ["hi"]}', "'role'"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "'role' of system, user, assistant"),
        ('{"messages": [{"role": "user", "content": 3}]}', "string or a list of parts"),
        ('{"messages": [{"role": "user", "content": ["x"]}]}', "must be an object, found str"),
        ('{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', "unknown content part of type 'audio'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]}', "needs a path or URL"),
        ('{"messages": [{"role": "user", "content": [{"type": "video", "video": []}]}]}', "list of image paths"),
        ("3", "non-empty 'messages'"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = manifest(tmp_path, {"text": "fine"}, line)
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    assert f"{path}:2: " in str(error.value) and message in str(error.value)


def test_no_manifest_or_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no calibration manifest at"):
        read_manifest(tmp_path / "absent.jsonl")
    with pytest.raises(ManifestError, match="is a directory"):
        read_manifest(tmp_path)
    with pytest.raises(ManifestError, match="has no samples"):
        read_manifest(manifest(tmp_path, "", "  "))
    (tmp_path / "calib.jsonl").write_bytes(image())
    with pytest.raises(ManifestError, match="not UTF-8"):
        read_manifest(tmp_path / "calib.jsonl")


def test_a_broken_video_is_named(tmp_path: Path, processor: Any) -> None:
    pytest.importorskip("cv2")
    (tmp_path / "v.mp4").write_text("not a video")
    for video, message in [("v.mp4", "not a video that can be decoded"), ("absent.mp4", "no file at")]:
        with pytest.raises(MediaError, match=message):
            inputs_of(manifest(tmp_path, chat({"type": "video", "video": video})), processor)


def test_a_video_file_gives_the_frames_that_are_asked_for(tmp_path: Path, processor: Any) -> None:
    cv2 = pytest.importorskip("cv2")
    import numpy as np

    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 4, (112, 112))
    for i in range(16):  # four seconds
        writer.write(np.full((112, 112, 3), 16 * i, np.uint8))
    writer.release()
    file = {"type": "video", "video": "v.avi", "min_pixels": 112 * 112, "max_pixels": 112 * 112}
    settings = [{"fps": 2}, {"fps": 4}, {"fps": 4, "max_frames": 6}, {"fps": 1, "min_frames": 8}, {"nframes": 4}]
    prepared = inputs_of(manifest(tmp_path, *[chat({**file, **one}) for one in settings]), processor)
    # two frames make one step in time
    assert [p.inputs["video_grid_thw"][0, 0].item() for p in prepared] == [4, 8, 3, 4, 2]
    with pytest.raises(MediaError, match=r"calib.jsonl:1: of the 16 frames of .*interval \[2, 16\]"):
        inputs_of(manifest(tmp_path, chat({**file, "nframes": 40})), processor)


def test_what_cannot_be_brought_to_size_is_one_line(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "a.png").write_bytes(image((112, 112)))
    (tmp_path / "b.png").write_bytes(image((56, 112)))
    for part, message in [
        ({"type": "video", "video": ["a.png", "b.png"]}, "frames are of two sizes, 112 x 112 and 56 x 112"),
        ({"type": "image", "image": "a.png", "max_pixels": 100}, "can't be brought to size"),
        ({"type": "video", "video": ["a.png", "a.png"], "max_pixels": 50176}, "can't be brought to size"),
    ]:
        with pytest.raises(MediaError, match=f"calib.jsonl:1: .*{message}"):
            inputs_of(manifest(tmp_path, chat(part)), processor)


ODD_SIZES = [
    *[(150, 1), (1, 150), (200, 1), (1, 1), (2, 1), (3, 500), (10, 1999), (600, 3)],
    *[(27, 29), (57, 3), (111, 333), (14, 14), (45, 1), (8000, 40)],
]


@pytest.mark.parametrize("size", ODD_SIZES)
def test_an_image_of_any_size_is_what_a_server_shows(tmp_path: Path, processor: Any, size: tuple[int, int]) -> None:
    """vLLM gives the whole image to the checkpoint's processor and lets it resize."""
    image = Image.effect_noise(size, 80).convert("RGB")
    image.save(tmp_path / "odd.png")
    content = [{"type": "image", "image": "odd.png"}, {"type": "text", "text": "What?"}]
    sample = CalibrationSample([{"role": "user", "content": content}], "m:1", tmp_path)
    (found,) = prepare([sample], processor, max_tokens=10**5, max_pixels=None)
    text = processor.apply_chat_template(sample.messages, tokenize=False)
    shown = dict(processor(text=[text], images=[image], return_tensors="pt"))
    del shown["attention_mask"]
    assert shown.keys() == found.inputs.keys()
    for name, value in shown.items():
        assert torch.equal(found.inputs[name], value), name
