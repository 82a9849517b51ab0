"""The plans of the kernel: those that are shipped fit their shapes, others take the nearest, and some have none."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from serve.kernels import plans
from serve.kernels.plans import MAX_ROWS, ROWS, SMS, Plan, candidates, plan_for
from serve.kernels.product import SOURCE, Shape, options, plans_of

SHIPPED = json.loads(Path(plans.__file__).with_name("plans.json").read_text())["plans"]
QWEN2_VL = [
    (2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960),  # 2B
    (4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944),  # 7B
    (10240, 8192), (8192, 8192), (59136, 8192), (8192, 29568),  # 72B
]  # fmt: skip


@pytest.mark.parametrize("kind", sorted(SHIPPED))
def test_what_is_shipped_fits(kind: str) -> None:
    rows = int(kind.split("/")[1])
    assert rows in ROWS
    for shape, numbers in SHIPPED[kind].items():
        columns, inputs = map(int, shape.split(","))
        assert Plan(*numbers[:5]).fits(columns, inputs, rows, SMS), (shape, numbers)
        assert numbers[5] > 0


@pytest.mark.parametrize("rows", ROWS)
def test_every_product_of_qwen2_vl_was_measured(rows: int) -> None:
    for columns, inputs in QWEN2_VL:
        assert f"{columns},{inputs}" in SHIPPED[f"128/{rows}"]
        assert plan_for(columns, inputs, 128, rows) == Plan(*SHIPPED[f"128/{rows}"][f"{columns},{inputs}"][:5])


def test_an_unknown_shape_takes_the_nearest_that_fits() -> None:
    found = plan_for(4672, 3584, 128, 2)
    assert found == plan_for(4608, 3584, 128, 2)
    odd = plan_for(64, 256, 128, 2)
    assert odd is None or odd.fits(64, 256, 2, SMS)
    assert plan_for(4608, 3584, 16, 2) is None


@pytest.mark.parametrize("sms", [78, 114, 132])
def test_a_plan_never_wants_more_shared_memory_than_there_is(sms: int) -> None:
    for columns, inputs in QWEN2_VL:
        for rows in ROWS:
            found = plan_for(columns, inputs, 128, rows, sms)
            assert found is not None and found.shared(columns, inputs, rows, sms) <= 226 * 1024


@pytest.mark.parametrize(("columns", "inputs"), QWEN2_VL[:8])
def test_candidates_fit_and_differ(columns: int, inputs: int) -> None:
    for rows in ROWS:
        found = list(candidates(columns, inputs, rows))
        assert found and len(set(found)) == len(found)
        assert all(plan.fits(columns, inputs, rows, SMS) for plan in found)


def test_rows_rise() -> None:
    assert all(a < b for a, b in pairwise(ROWS)) and ROWS[-1] == MAX_ROWS


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (Shape(4608, 3584, 128, False), None),
        (Shape(4608, 3584, 32, True), None),
        (Shape(4608, 3584, -1, False), "groups of -1, not 32, 64, 128"),
        (Shape(4600, 3584, 128, False), "4600 outputs and 3584 inputs, not multiples of 64 and 128"),
        (Shape(4608, 3520, 64, False), "4608 outputs and 3520 inputs, not multiples of 64 and 128"),
    ],
)
def test_what_it_does_not_take(shape: Shape, reason: str | None) -> None:
    assert shape.reason() == reason


def test_every_definition_of_a_plan_is_used_by_the_source() -> None:
    source = SOURCE.read_text(encoding="utf-8")
    given = options(Shape(4608, 3584, 64, True), Plan(4, 2, 3, 8, 8), 16, SMS)
    named = dict(each.removeprefix("-D").split("=") for each in given if each.startswith("-D"))
    assert named["MT"] == "2" and named["GROUP_TILES"] == "4" and named["HALF"] == "1"
    assert all(source.count(name) > 1 for name in named)


@pytest.mark.parametrize(("columns", "inputs"), [(151936, 1536), (152064, 3584), (152064, 8192), (75968, 1536)])
def test_output_heads_have_plans(columns: int, inputs: int) -> None:
    """Of 2B, 7B and 72B, and half of the 2B's: `--lm-head` brings them to the kernel too."""
    assert Shape(columns, inputs, 128, False).reason() is None
    assert [rows for rows, _ in plans_of(Shape(columns, inputs, 128, False), SMS)] == list(ROWS)
