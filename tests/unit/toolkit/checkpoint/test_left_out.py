"""What is left in 16 bits is named so that every engine leaves just these."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

import pytest

from toolkit.checkpoint.compressed import matches
from toolkit.checkpoint.left_out import Linear, describe, ignored, modules_to_not_convert, vllm_ignores, vllm_leaves
from toolkit.compat import patch_torchvision
from toolkit.errors import FormatError
from toolkit.models.qwen2_vl import QWEN2_VL

LINEARS, FUSED = QWEN2_VL.linears, QWEN2_VL.fused
VISION = [f"blocks.{i}.{name}" for i in range(32) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
VISION += ["merger.mlp.0", "merger.mlp.2"]


def units(*chosen: tuple[int, str]) -> frozenset[Linear]:
    return frozenset((layer, name) for layer, fused in chosen for name in FUSED[fused])


# What engines do with the list, after their sources; see the module's docstring for where.


def vllm(entries: Sequence[str], names: str) -> Callable[[str, str], bool]:
    """vLLM 0.25 and 0.32, from a list that may begin like a checkpoint's names."""
    renames = [("model.language_model.", "language_model.model."), ("model.visual.", "visual.")]
    renames += [("lm_head.", "language_model.lm_head."), ("model.", "language_model.model.")]
    mapped = []
    for entry in entries:
        for old, new in renames:
            if entry.startswith(old):
                entry = entry.replace(old, new, 1)
        mapped.append(entry)

    def leaves(where: str, name: str) -> bool:
        prefix = f"visual.{name}" if where == "visual" else f"language_model.model.{where}.{name}"
        if any(entry in prefix for entry in mapped):
            return True
        if names == "fused" and len(FUSED.get(name, ())) > 1:
            stem = prefix.removesuffix(name)
            verdicts = {any(entry in stem + part for entry in mapped) for part in FUSED[name]}
            assert len(verdicts) == 1, "vLLM raises ValueError"
            return verdicts.pop()
        return False

    return leaves


def sglang(entries: Sequence[str]) -> Callable[[str, str], bool]:
    def leaves(where: str, name: str) -> bool:
        if where == "visual":
            return any(entry in f"visual.{name.replace('attn.qkv', 'attn.qkv_proj')}" for entry in entries)
        return any(entry in f"model.{where}.{name}" for entry in entries)

    return leaves


def transformers(entries: Sequence[str]) -> Callable[[str, str], bool]:
    matches = [re.compile(entry).match for entry in entries]  # what matches "entry\\." matches "entry" too

    def leaves(where: str, name: str) -> bool:
        full = f"model.visual.{name}" if where == "visual" else f"model.language_model.{where}.{name}"
        return any(match(full) for match in matches) or full.endswith(tuple(entries))

    return leaves


def left_sets(layers: int, count: int) -> list[frozenset[Linear]]:
    """Random units, single ones, whole kinds, layers whose numbers are parts of others'."""
    rng = random.Random(layers)
    every = [(layer, fused) for layer in range(layers) for fused in FUSED]
    found = [units(*rng.sample(every, rng.randint(1, 40))) for _ in range(count)]
    found += [units((layer, fused)) for layer in (1, 2, layers - 1) for fused in FUSED]
    found += [units(*((1, fused) for fused in FUSED)), frozenset()]
    found += [units(*((layer, fused) for layer in range(layers))) for fused in FUSED]
    return found


@pytest.mark.parametrize("layers", [28, 80])
def test_engines_leave_these_and_no_others(layers: int) -> None:
    for left in left_sets(layers, 4):
        entries = modules_to_not_convert(left, layers, QWEN2_VL)
        for leaves, names in (
            (vllm(entries, "fused"), tuple(FUSED)),
            (vllm(entries, "plain"), tuple(FUSED)),  # before the model has told vLLM what is fused
            (sglang(entries), tuple(FUSED)),
            (transformers(entries), LINEARS),
        ):
            for layer in range(layers):
                for name in names:
                    expected = (layer, FUSED.get(name, (name,))[0]) in left
                    assert leaves(f"layers.{layer}", name) == expected, (entries, layer, name)
            assert all(leaves("visual", name) for name in VISION)


def test_autoawq_leaves_kinds() -> None:
    for fused, parts in FUSED.items():
        entries = modules_to_not_convert(units(*((layer, fused) for layer in range(28))), 28, QWEN2_VL)
        assert [name for name in LINEARS if any(entry in name for entry in entries)] == list(parts)


def test_the_check_of_checkpoints_is_vllms() -> None:
    for left in left_sets(28, 3):
        entries = modules_to_not_convert(left, 28, QWEN2_VL)
        for written in (entries, [re.sub(r"^layers", "model.language_model.layers", entry) for entry in entries]):
            for layer in range(28):
                for fused, parts in FUSED.items():
                    found = vllm_leaves(f"language_model.model.layers.{layer}.{fused}", written, QWEN2_VL)
                    assert found == ((layer, parts[0]) in left)
            assert all(vllm_leaves(f"visual.{name}", written, QWEN2_VL) for name in VISION)


def test_what_compressed_tensors_ignores_is_what_is_left() -> None:
    for left in left_sets(28, 3):
        entries = ignored(left, 28, QWEN2_VL)
        for layer in range(28):
            for fused, parts in FUSED.items():
                assert vllm_ignores(f"language_model.model.layers.{layer}.{fused}", entries, QWEN2_VL) == (
                    (layer, parts[0]) in left
                )
                for part in parts:  # transformers' names
                    name = f"model.language_model.layers.{layer}.{part}"
                    assert any(matches(entry, name) for entry in entries) == ((layer, part) in left)
        assert all(vllm_ignores(f"visual.{name}", entries, QWEN2_VL) for name in VISION)
        assert all(any(matches(entry, f"model.visual.{name}") for entry in entries) for name in VISION)
        assert vllm_ignores("language_model.lm_head", entries, QWEN2_VL)
        assert not vllm_ignores("language_model.lm_head", ignored(left, 28, QWEN2_VL, lm_head=True), QWEN2_VL)


@pytest.mark.slow
def test_the_check_of_ignore_is_that_of_the_installed_vllm() -> None:
    patch_torchvision()
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.compressed_tensors.utils")
    scheme = pytest.importorskip("vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors")
    models = pytest.importorskip("vllm.model_executor.models.qwen2_vl")
    mapper = models.Qwen2VLForConditionalGeneration.hf_to_vllm_mapper
    packed = {fused.split(".")[1]: [p.split(".")[1] for p in parts] for fused, parts in FUSED.items() if len(parts) > 1}
    names = [f"language_model.model.layers.{layer}.{fused}" for layer in range(28) for fused in FUSED]
    names += [f"visual.{name}" for name in VISION] + ["language_model.lm_head"]
    rng = random.Random(0)
    odd = ["re:.*layers.1", "re:.*k_proj", "model.visual", "re:.*mlp", "lm_head", "re:visual", "re:.*gate_up_proj"]
    odd += ["model.layers.3.self_attn.q_proj", "model.language_model.layers.4.mlp.down_proj"]
    lists = [ignored(left, 28, QWEN2_VL) for left in left_sets(28, 5)]
    lists += [rng.sample(odd, 2) for _ in range(12)] + [[entry] for entry in odd]
    outcomes = set()
    for entries in lists:
        config = scheme.CompressedTensorsConfig({}, list(entries), "pack-quantized")
        config.apply_vllm_mapper(mapper.get_rename_mapper())
        for name in names:
            try:
                expected: bool | str = utils.should_ignore_layer(name, config.ignore, packed)
            except ValueError:
                expected = "refused"
            try:
                found: bool | str = vllm_ignores(name, entries, QWEN2_VL)
            except FormatError:
                found = "refused"
            assert found == expected, (name, entries)
            outcomes.add(found)
    assert outcomes == {True, False, "refused"}


@pytest.mark.slow
def test_the_check_of_checkpoints_is_that_of_the_installed_vllm() -> None:
    patch_torchvision()
    quant_utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.quant_utils")
    models = pytest.importorskip("vllm.model_executor.models.qwen2_vl")
    mapper = models.Qwen2VLForConditionalGeneration.hf_to_vllm_mapper.get_rename_mapper()
    packed = {fused.split(".")[1]: [p.split(".")[1] for p in parts] for fused, parts in FUSED.items() if len(parts) > 1}
    names = [f"language_model.model.layers.{layer}.{fused}" for layer in range(28) for fused in FUSED]
    names += [f"visual.{name}" for name in VISION] + ["language_model.lm_head"]
    rng = random.Random(0)
    odd = ["layers.1", "k_proj", "model.visual", "mlp", "lm_head", "model.layers.3.self_attn.q_proj", "gate_up_proj"]
    lists = [modules_to_not_convert(left, 28, QWEN2_VL) for left in left_sets(28, 5)]
    lists += [rng.sample(odd, 2) for _ in range(12)]
    outcomes = set()
    for entries in lists:
        mapped = mapper.apply_list(entries)
        for name in names:
            try:
                expected: bool | str = quant_utils.is_layer_skipped(name, mapped, packed, match_mode="substring")
            except ValueError:
                expected = "refused"
            try:
                found: bool | str = vllm_leaves(name, entries, QWEN2_VL)
            except FormatError:
                found = "refused"
            assert found == expected, (name, entries)
            outcomes.add(expected)
    assert outcomes == {True, False, "refused"}


def test_transformers_own_rule() -> None:
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    left = units((1, "mlp.gate_up_proj"), (12, "self_attn.qkv_proj"))
    entries = modules_to_not_convert(left, 28, QWEN2_VL)
    names = {f"model.language_model.layers.{i}.{name}": (i, name) for i in range(28) for name in LINEARS}
    assert {names[n] for n in names if not utils.should_convert_module(n, entries)} == left
    assert not any(utils.should_convert_module(f"model.visual.{name}", entries) for name in VISION)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (set(), ""),
        ({(0, n) for n in LINEARS} | {(i, n) for i in (3, 4, 5) for n in LINEARS}, "layers 0, 3-5"),
        ({(7, "mlp.down_proj")}, "mlp.down_proj of layer 7"),
        ({(i, "self_attn.o_proj") for i in range(8)}, "self_attn.o_proj of every layer"),
        (units((2, "mlp.gate_up_proj"), (2, "mlp.down_proj"), (3, "mlp.down_proj")),
         "mlp.gate_proj, mlp.up_proj of layer 2; mlp.down_proj of layers 2-3"),
    ],
)  # fmt: skip
def test_described(left: set[Linear], said: str) -> None:
    assert describe(left, 8, QWEN2_VL) == said


def test_a_tower_that_is_partly_packed_is_read_alike() -> None:
    """Of block 1 one linear stays, and block 11's of the same name does not."""
    entries = modules_to_not_convert(frozenset(), 28, QWEN2_VL, ["blocks.1.attn.qkv", "merger.mlp.2"])
    names = [f"blocks.{i}.{name}" for i in (0, 1, 11) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    names += ["merger.mlp.0", "merger.mlp.2"]
    left = {"blocks.1.attn.qkv", "merger.mlp.2"}
    assert {name for name in names if vllm_leaves(f"visual.{name}", entries, QWEN2_VL)} == left
    assert not any(vllm_leaves(f"language_model.model.layers.1.{u.name}", entries, QWEN2_VL) for u in QWEN2_VL.units)
    utils = pytest.importorskip("transformers.quantizers.quantizers_utils")
    assert {name for name in names if not utils.should_convert_module(f"model.visual.{name}", entries)} == left
