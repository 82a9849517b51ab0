"""What an image costs before a model sees it: decoding, and the processor's resizing, normalising and cutting into
patches. The server does the same for each request, on the CPU."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from bench.questions.tasks import check_image
from toolkit.calibration.media import decode
from toolkit.compat import patch_torchvision
from toolkit.paths import demo_checkpoint

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

#: A photograph's usual size in benchmarks, and a scanned page's.
SIZES = [(448, 448), (1092, 1540)]


def encoded(size: tuple[int, int], kind: str) -> bytes:
    """An image with edges and noise: neither a flat colour nor random bytes, which compress unlike any image."""
    rng = np.random.default_rng(0)
    width, height = size
    slopes = np.add.outer(np.arange(height) // 7 * 13, np.arange(width) // 11 * 17)[..., None] + np.array([0, 80, 160])
    pixels = (slopes + rng.integers(0, 12, (height, width, 3))) % 256
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(params=SIZES, ids=["448x448", "page"])
def size(request: pytest.FixtureRequest) -> tuple[int, int]:
    """Width and height."""
    found: tuple[int, int] = request.param
    return found


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_decoding(benchmark: BenchmarkFixture, size: tuple[int, int], kind: str) -> None:
    """Bytes to pixels, with every check."""
    data = encoded(size, kind)
    assert benchmark(decode, data, "micro", "image").size == size


def test_reading_a_questions_image(benchmark: BenchmarkFixture, size: tuple[int, int]) -> None:
    """What the benchmark does with each image of a set: hash and decode."""
    data = encoded(size, "JPEG")
    assert benchmark(check_image, data, "micro", "image").sha256


@pytest.fixture(scope="module")
def processor() -> Any:
    """The image processor, as the embedded model has it."""
    patch_torchvision()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(demo_checkpoint()).image_processor


def test_preprocessing(benchmark: BenchmarkFixture, processor: Any, size: tuple[int, int]) -> None:
    """Pixels to the vision tower's patches, in the size they have."""
    image = Image.open(io.BytesIO(encoded(size, "PNG"))).convert("RGB")
    inputs = benchmark(lambda: processor(images=[image], return_tensors="pt", do_resize=False))
    patches = inputs["pixel_values"].shape[0]
    assert patches == size[0] * size[1] // 14**2
    benchmark.extra_info["patches"] = patches


def test_preprocessing_with_resizing(benchmark: BenchmarkFixture, processor: Any) -> None:
    """A photograph of 12 megapixels, brought down to a million."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), np.uint8))
    bounds = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    inputs = benchmark(lambda: processor(images=[image], return_tensors="pt", size=bounds))
    assert inputs["pixel_values"].shape[0] <= 4 * 1280
