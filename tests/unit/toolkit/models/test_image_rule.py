"""How many tokens an image becomes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from toolkit.compat import patch_torchvision
from toolkit.models.image_rule import RULES, ImageRule, rule_of
from toolkit.paths import demo_checkpoint


@pytest.mark.parametrize("family", RULES)
def test_the_rule_is_that_of_transformers(family: str) -> None:
    patch_torchvision()
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    rule, draw = RULES[family], random.Random(family)
    sizes = [(draw.randint(1, 200) * 2, draw.randint(1, 200) * 2) for _ in range(300)]
    sizes += [(draw.randint(1000, 9000), draw.randint(1000, 9000)) for _ in range(300)]
    for width, height in sizes:
        if max(width, height) > 200 * min(width, height):
            continue
        down, across = smart_resize(height, width, rule.side, rule.min_pixels, rule.max_pixels)
        assert rule.tokens(width, height) == down * across // rule.side**2, (width, height)


def test_a_checkpoint_says_its_own_bounds(tmp_path: Path) -> None:
    assert rule_of(demo_checkpoint()) == RULES["Qwen2-VL, Qwen2.5-VL"]
    (tmp_path / "preprocessor_config.json").write_text(
        '{"size": {"shortest_edge": 784, "longest_edge": 100352}, "patch_size": 14, "merge_size": 2}'
    )
    assert rule_of(tmp_path) == ImageRule(28, 784, 100352)
    assert rule_of(tmp_path / "nowhere") is None
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 14}')
    assert rule_of(tmp_path) is None


def test_a_prompt_has_so_many_tokens_more_with_an_image_and_two_around_it() -> None:
    """What `qvl bench` holds against a server's counts, by the checkpoint's own template and processor."""
    patch_torchvision()
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(demo_checkpoint())
    rule = rule_of(demo_checkpoint())
    assert rule is not None

    def tokens(*sizes: tuple[int, int]) -> int:
        content = [*({"type": "image"} for _ in sizes), {"type": "text", "text": "What is shown?"}]
        asked = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        images = [Image.new("RGB", size) for size in sizes]
        return int(processor(text=[asked], images=images or None, return_tensors="np")["input_ids"].shape[1])

    for sizes in ([(224, 224)], [(336, 252), (100, 37)], [(448, 448)] * 3):
        assert tokens(*sizes) - tokens() == sum(rule.tokens(*size) + 2 for size in sizes)
