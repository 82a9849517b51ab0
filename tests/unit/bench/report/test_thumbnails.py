from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.questions.tasks import ImageData, check_image
from bench.report.thumbnails import BUDGET, SIZES, thumbnails
from tests.support.factory import image


def noisy(seed: int, width: int = 900, height: int = 600) -> ImageData:
    """An image that no encoder makes small."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return check_image(buffer.getvalue(), "test", "image")


def decoded(url: str) -> Image.Image:
    head, _, payload = url.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))


def test_small_images_keep_their_size_and_large_ones_their_shape() -> None:
    small, large = image(1, 48, 32), noisy(0)
    found = thumbnails([small, large])
    assert decoded(found.urls[small.sha256]).size == (48, 32)
    width, height = decoded(found.urls[large.sha256]).size
    assert (width, round(width / height, 1)) == (SIZES[0], 1.5)
    assert (found.left_out, found.unreadable) == (0, 0)


def test_many_images_share_the_budget() -> None:
    shown = [noisy(seed, 300, 300) for seed in range(12)]
    roomy = thumbnails(shown)
    tight = thumbnails(shown, budget=sum(map(len, roomy.urls.values())) // 2)
    assert set(roomy.urls) == set(tight.urls) == {p.sha256 for p in shown}
    assert sum(map(len, tight.urls.values())) <= sum(map(len, roomy.urls.values())) // 2
    assert sum(map(len, roomy.urls.values())) <= BUDGET
    assert min(decoded(url).width for url in tight.urls.values()) in SIZES


@pytest.mark.parametrize("budget", [0, 30_000])
def test_what_does_not_fit_is_left_out_and_counted(budget: int) -> None:
    shown = [noisy(seed, 200, 200) for seed in range(8)]
    found = thumbnails(shown, budget)
    assert found.left_out == 8 - len(found.urls) > 0
    assert sum(map(len, found.urls.values())) <= budget


def test_an_image_shown_twice_counts_twice() -> None:
    once, again = noisy(1, 200, 200), noisy(2, 200, 200)
    size = len(thumbnails([once]).urls[once.sha256])
    found = thumbnails([once, again, once, again], budget=4 * size - 100)
    assert 2 * sum(map(len, found.urls.values())) <= 4 * size - 100


def test_what_is_transparent_is_shown_on_white() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(buffer, "PNG")
    clear = check_image(buffer.getvalue(), "test", "image")
    assert decoded(thumbnails([clear]).urls[clear.sha256]).convert("RGB").getpixel((4, 4)) == (255, 255, 255)


def test_a_file_that_is_gone_or_damaged_is_counted(tmp_path: Path) -> None:
    gone = replace(image(1), data=None, path=tmp_path / "gone.png")
    (tmp_path / "bad.png").write_bytes(b"no image any more")
    bad = replace(image(2), data=None, path=tmp_path / "bad.png")
    found = thumbnails([gone, bad, image(3)])
    assert (len(found.urls), found.left_out, found.unreadable) == (1, 0, 2)
