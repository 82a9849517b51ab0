"""Which linears stay in 16 bits: whole units, by name or by what they cost."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.left_out import Linear
from toolkit.errors import FormatError
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.quantize.search.mixed import choose, skipped

LINEARS, FUSED = QWEN2_VL.linears, QWEN2_VL.fused
UNITS = tuple(FUSED.values())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(tiny.write(tmp_path_factory.mktemp("mixed") / "m"))


def units(*chosen: tuple[int, str]) -> frozenset[Linear]:
    return frozenset((layer, name) for layer, fused in chosen for name in FUSED[fused])


class TestSkipped:
    def test_nothing(self, source: Checkpoint) -> None:
        assert skipped(None, source) == frozenset()

    def test_a_layer(self, source: Checkpoint) -> None:
        assert skipped(r"layers\.0\.", source) == {(0, name) for name in LINEARS}

    def test_a_kind(self, source: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
        assert skipped("down_proj|o_proj$", source) == units(
            *((i, name) for i in range(tiny.LAYERS) for name in ("mlp.down_proj", "self_attn.o_proj"))
        )
        assert capsys.readouterr().err == ""

    def test_units_are_made_whole(self, source: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
        assert skipped(r"layers\.1\..*(k_proj|up_proj)", source) == units(
            (1, "self_attn.qkv_proj"), (1, "mlp.gate_up_proj")
        )
        said = capsys.readouterr().err
        assert "self_attn.q_proj, self_attn.v_proj, mlp.gate_proj of layer 1 in 16 bits too" in said

    def test_names_are_those_of_the_checkpoint(self, tmp_path: Path) -> None:
        nested = Checkpoint.open(tiny.write(tmp_path / "m", nested=True))
        assert skipped(r"^model\.language_model\.layers\.1\.mlp\.down", nested) == {(1, "mlp.down_proj")}
        with pytest.raises(FormatError, match=r"such as model\.language_model\.layers\.0\.mlp\.down_proj"):
            skipped(r"^model\.layers", nested)

    @pytest.mark.parametrize(
        ("regex", "message"),
        [
            ("layers.(", "not a regular expression: missing \\)"),
            ("visual", r"matches no linear of the decoder \(such as model\.layers\.0\.mlp\.down_proj\)"),
            (r"layers\.7\.", "matches no linear"),
            ("", "every linear in 16 bits"),
            ("[qo]_proj|mlp.up|down", "every linear in 16 bits"),
        ],
    )
    def test_refused(self, source: Checkpoint, regex: str, message: str) -> None:
        with pytest.raises(FormatError, match=message):
            skipped(regex, source)


def report(layers: int = tiny.LAYERS, **errors: float) -> dict[str, Any]:
    """A report in which a unit "0/mlp.down_proj" errs as said, and the others by 0.01."""
    return {
        "layers": [
            {
                "layer": i,
                "units": {
                    fused: {"error": {"rtn": 1.0, "autoawq": None, "moments": errors.get(f"{i}/{fused}", 0.01)}}
                    for fused in FUSED
                },
            }
            for i in range(layers)
        ],
        "signal": [],
    }


def share(*left: tuple[int, str]) -> float:
    """What leaving these units adds, relative to the quantized checkpoint, and a byte for rounding."""
    base = quantized_nbytes(frozenset())
    return (quantized_nbytes(units(*left)) - base + 1) / base


def quantized_nbytes(left: frozenset[Linear]) -> int:
    return sum(t.numel() * t.element_size() for t in tiny.tensors(version="gemm", left=left).values())


class TestChoose:
    def test_the_worst_for_its_size(self, source: Checkpoint) -> None:
        worst = report(**{"1/self_attn.o_proj": 0.5, "0/mlp.gate_up_proj": 0.6})  # gate_up is four times the size
        both = ((1, "self_attn.o_proj"), (0, "mlp.gate_up_proj"))
        assert choose(worst, share(both[0]), source, 64) == units(both[0])
        assert choose(worst, share(*both), source, 64) == units(*both)

    def test_what_still_fits_is_taken(self, source: Checkpoint) -> None:
        worst = report(**{"0/mlp.gate_up_proj": 9.0, "1/self_attn.o_proj": 0.5})
        assert choose(worst, share((1, "self_attn.o_proj")), source, 64) == {(1, "self_attn.o_proj")}

    @pytest.mark.parametrize("group_size", [32, 64, -1])
    def test_the_budget_is_kept_and_used(self, source: Checkpoint, group_size: int) -> None:
        rng = random.Random(group_size)
        sizes = {}
        for left in (frozenset[Linear](), *(units((0, fused)) for fused in FUSED)):
            found = tiny.tensors(version="gemm", group_size=group_size, left=left)
            sizes[left] = sum(t.numel() * t.element_size() for t in found.values())
        base = sizes[frozenset()]
        extra = {fused: sizes[units((0, fused))] - base for fused in FUSED}
        for _ in range(20):
            errors = {f"{i}/{fused}": rng.random() for i in range(tiny.LAYERS) for fused in FUSED}
            budget = rng.uniform(0.15, 0.8)
            left = choose(report(**errors), budget, source, group_size)
            spent = sum(
                extra[fused] for _, fused in {(i, f) for i in range(2) for f in FUSED if (i, FUSED[f][0]) in left}
            )
            assert 0 < spent <= budget * base
            assert all((i, name) in left for i, first in left for unit in UNITS if first in unit for name in unit)
            unused = [f for i in range(tiny.LAYERS) for f in FUSED if (i, FUSED[f][0]) not in left]
            assert all(spent + extra[fused] > budget * base for fused in unused)

    def test_units_that_do_not_hurt_are_not_kept(self, source: Checkpoint) -> None:
        every = {f"{i}/{fused}": 0.0 for i in range(tiny.LAYERS) for fused in FUSED}
        assert choose(report(**every), 0.5, source, 64) == frozenset()
        assert choose(report(**{**every, "1/mlp.down_proj": 1e-3}), 5, source, 64) == {(1, "mlp.down_proj")}

    def test_another_search(self, source: Checkpoint) -> None:
        found = report(**{"1/self_attn.o_proj": 0.5})
        found["layers"][0]["units"]["self_attn.o_proj"]["error"]["rtn"] = 2.0
        assert choose(found, share((0, "self_attn.o_proj")), source, 64, search="rtn") == {(0, "self_attn.o_proj")}

    @pytest.mark.parametrize("budget", [0, -0.1, float("nan"), float("inf")])
    def test_no_budget(self, source: Checkpoint, budget: float) -> None:
        with pytest.raises(FormatError, match=r"give 0\.1 for 10 %"):
            choose(report(), budget, source, 64)

    def test_a_budget_for_nothing_and_for_everything(self, source: Checkpoint) -> None:
        with pytest.raises(
            FormatError, match=r"smallest unit in 16 bits takes .* more: give at least ([0-9.]+)"
        ) as info:
            choose(report(), 1e-3, source, 64)
        least = re.search(r"at least ([0-9.]+[0-9])", str(info.value))
        assert least is not None and choose(report(), float(least[1]), source, 64)
        with pytest.raises(FormatError, match="every linear in 16 bits"):
            choose(report(), 4, source, 64)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r.pop("layers"), "not a report on layers"),
            (lambda r: r.update(layers=[1, 2]), "not a report on layers"),
            (lambda r: r.update(layers=[{"layer": 0, "relative_error": 0.1}] * 2), "not a report on layers"),
            (lambda r: r["layers"].pop(), "about 1 layers, and .* has 2"),
            (lambda r: r.update(group_size=128), "about --group-size 128, not 64"),
            (lambda r: r["layers"][1]["units"].pop("mlp.down_proj"), r"no error of mlp\.down_proj in layer 1"),
            (
                lambda r: r["layers"][0]["units"]["mlp.down_proj"]["error"].update(moments=float("nan")),
                r"no error of mlp\.down_proj in layer 0 by the moments search \(it says nan\)",
            ),
        ],
    )
    def test_what_is_no_report_of_this_model(
        self, source: Checkpoint, change: Callable[[dict[str, Any]], object], message: str
    ) -> None:
        found = report()
        change(found)
        with pytest.raises(FormatError, match=message):
            choose(found, 0.2, source, 64)

    def test_a_search_that_was_not_run(self, source: Checkpoint) -> None:
        with pytest.raises(FormatError, match=r"no error of self_attn\.qkv_proj in layer 0 by the autoawq search"):
            choose(report(), 0.2, source, 64, search="autoawq")
