"""What distillation will need of published sizes, and where it is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.distillation.plan import DistillationPlan, distillation_flops, plan_distillation
from toolkit.quantize.recipe import Recipe

#: Of 512 calibration texts, and of the longest.
TOKENS, LONGEST = 262_000, 1_300


def size(name: str) -> Any:
    """A checkpoint of a published size, as far as plans look at it."""
    config = QWEN2_VL.config(QWEN2_VL.sizes[name])
    return SimpleNamespace(
        family=QWEN2_VL,
        text_config=config,
        linear_shapes=lambda: QWEN2_VL.linear_shapes(config),
        num_layers=config["num_hidden_layers"],
        vision=QWEN2_VL.vision(config["vision_config"], config),
        visual_prefix="visual.",
        tensors={"visual.all": SimpleNamespace(numel=676_000_000)},
    )


def planned(name: str, total: float | None, **recipe: Any) -> DistillationPlan:
    total = None if total is None else int(total)
    return plan_distillation(size(name), Recipe(**recipe), TOKENS, LONGEST, total=total, base=0.6e9)


def test_a_7b_fits_on_24_gb_and_a_72b_does_not() -> None:
    found = planned("7b", 24e9)
    assert found.left_out is None and found.store_on_device and found.device < 20e9
    left = planned("72b", 24e9)
    assert left.left_out is not None and "70 GB of GPU memory, and there are 24 GB" in left.left_out
    assert left.told() == f"distillation: left out, {left.left_out}"
    assert planned("72b", 80e9).left_out is None


def test_samples_wait_in_host_memory_where_the_device_is_small() -> None:
    roomy, tight = planned("7b", 24e9), planned("7b", 16e9)
    assert tight.left_out is None and not tight.store_on_device
    assert tight.device < 16e9 < roomy.device and tight.host == roomy.device - tight.device
    on_cpu = planned("7b", None)
    assert on_cpu.left_out is None and on_cpu.host == 0 and on_cpu.device > roomy.device


def test_smaller_groups_have_more_that_learns() -> None:
    assert planned("7b", 80e9, group_size=64).device > planned("7b", 80e9).device > planned("2b", 80e9).device
    assert planned("7b", 80e9, group_size=-1).device < planned("7b", 80e9).device


def test_time_follows_from_tokens_and_epochs() -> None:
    one = distillation_flops(size("7b"), TOKENS, 1)
    weights, head = 28 * sum(k * n for k, n in size("7b").linear_shapes().values()), 152_064 * 3584
    assert one == pytest.approx(2 * TOKENS * (5 * weights + 3 * head))
    assert distillation_flops(size("7b"), TOKENS, 2) - one == pytest.approx(2 * TOKENS * (4 * weights + 3 * head))
