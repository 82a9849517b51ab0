"""compressed-tensors reads what is written as the same weights, bit for bit; what else it holds is refused by name."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.compressed import quantization_config
from toolkit.checkpoint.inspection import inspect_checkpoint
from toolkit.checkpoint.layouts import LAYOUTS, packed_bytes
from toolkit.compat import patch_torchvision
from toolkit.errors import AlreadyQuantized, CheckpointError, FormatError
from toolkit.formats.convert import convert
from toolkit.formats.linears import read_quantized, read_tensor
from toolkit.formats.packing import PackedLinear, QuantizedLinear, dequantize, named, pack_as, unpack_as

GROUPS = st.sampled_from([16, 32, 64, 128, -1])


def decompressed(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight that the package makes of a module's tensors, by the scheme that the config says."""
    patch_torchvision()
    with warnings.catch_warnings():  # torch's compiler comes with it, and warns of itself
        warnings.simplefilter("ignore", DeprecationWarning)
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert not isinstance(scheme, list) and scheme.format is not None
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    weight: torch.Tensor = compressor.decompress(tensors, scheme)["weight"]
    return weight


@settings(deadline=None, max_examples=40)
@given(
    group_size=GROUPS,
    rows=st.integers(1, 5).map(lambda n: 8 * n),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_the_package_reads_the_same_weights(group_size: int, rows: int, dtype: torch.dtype, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else 3
    layer = QuantizedLinear(
        torch.randint(0, 16, (rows, 384), generator=rng, dtype=torch.uint8)[
            :, : 128 if groups == 1 else 3 * group_size
        ],
        torch.randint(0, 16, (rows, groups), generator=rng, dtype=torch.uint8),
        torch.randn((rows, groups), generator=rng).to(dtype),
    )
    tensors = named("compressed-tensors", "m", pack_as("compressed-tensors", layer))
    parts = {name.removeprefix("m."): tensor for name, tensor in tensors.items()}
    found = decompressed(quantization_config(group_size, []), parts)
    assert found.dtype == dtype and torch.equal(found, dequantize(layer))
    again = unpack_as("compressed-tensors", pack_as("compressed-tensors", layer), group_size)
    assert all(torch.equal(getattr(again, part), getattr(layer, part)) for part in ("values", "zeros", "scales"))


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_a_converted_file_is_read_by_the_package(tmp_path: Path, group_size: int) -> None:
    source = Checkpoint.open(tiny.write(tmp_path / "src", version="gemm", group_size=group_size))
    there = Checkpoint.open(convert(source.path, tmp_path / "there", "compressed-tensors"))
    for module in source.quantized_modules():
        parts = {part: there.get(f"{module}.{part}") for part in LAYOUTS["compressed-tensors"].parts}
        assert parts["weight_shape"].dtype == torch.int64
        found = decompressed(there.config["quantization_config"], parts)
        assert torch.equal(found, dequantize(read_quantized(source, module)))
        assert torch.equal(found.float(), read_tensor(there, f"{module}.weight", torch.float16).float())
    assert there.nbytes == source.nbytes + 16 * len(source.quantized_modules())


def test_it_is_described_as_any_other_format(tmp_path: Path) -> None:
    left = frozenset({(0, "mlp.down_proj")})
    path = tiny.write(tmp_path / "m", version="compressed-tensors", group_size=128, left=left, nested=True)
    found = inspect_checkpoint(path, deep=True)
    assert found.problems == [] and found.format == "compressed-tensors"
    assert found.quantization is not None
    assert (found.quantization["group_size"], found.quantization["format"]) == (128, "compressed-tensors")
    assert found.quantization["left_linears"] == {"mlp.down_proj": [0]}
    as_gemm = inspect_checkpoint(tiny.write(tmp_path / "g", version="gemm", group_size=128, left=left, nested=True))
    assert found.parameters == as_gemm.parameters
    assert found.quantization["quantized"] == as_gemm.quantization["quantized"]  # type: ignore[index]
    verdicts = {engine.name: (engine.runs, engine.tensor_parallel) for engine in found.engines}
    others = {engine.name: (engine.runs, engine.tensor_parallel) for engine in as_gemm.engines}
    assert verdicts["AutoAWQ 0.2.9"][0] == "no"
    assert {**verdicts, "AutoAWQ 0.2.9": None} == {**others, "AutoAWQ 0.2.9": None}


def test_scales_that_are_zero_are_found(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m", version="compressed-tensors")
    found = tiny.tensors(version="compressed-tensors")
    found["model.layers.0.mlp.up_proj.weight_scale"][3, 1] = 0
    tiny.write_tensors(path, found)
    assert [p.message for p in inspect_checkpoint(path, deep=True).problems] == [
        "model.layers.0.mlp.up_proj.weight_scale: 1 of 512 scales are 0, which loses their weights"
    ]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("inputs", "outputs", "group_size"), [(256, 64, 64), (384, 8, 128), (256, 24, -1)])
def test_bytes_are_counted_before_they_are_written(name: str, inputs: int, outputs: int, group_size: int) -> None:
    packed = tiny.random_packed(name, inputs, outputs, group_size, torch.Generator().manual_seed(0))
    tensors = named(name, "m", packed)
    counted = sum(tensor.nbytes for tensor in tensors.values())
    assert packed_bytes(LAYOUTS[name], inputs, outputs, group_size, 2) == counted
    shapes = {part.removeprefix("m."): tuple(tensor.shape) for part, tensor in tensors.items()}
    assert LAYOUTS[name].shapes(inputs, outputs, group_size) == shapes


class TestRefused:
    """Valid files of compressed-tensors that are something else, named; nothing is written."""

    def config(self, tmp_path: Path, **changes: Any) -> Path:
        """``a__b=c`` sets c at config_groups.group_0.a.b, ``top__a=c`` at the top."""
        path = tiny.write(tmp_path / "m", version="compressed-tensors")
        config = json.loads((path / "config.json").read_text())
        settings = config["quantization_config"]
        for key, value in changes.items():
            *way, last = key.split("__")
            place = settings if way == ["top"] else settings["config_groups"]["group_0"]
            for step in () if way == ["top"] else way:
                place = place[step]
            place[last] = value
        tiny.edit_json(path / "config.json", quantization_config=settings)
        return path

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"weights__num_bits": 3}, "weights of 3 bits"),
            ({"weights__num_bits": 8}, "weights of 8 bits"),
            ({"weights__type": "float"}, r"weights of 4 bits \(float\)"),
            ({"weights__symmetric": True}, "without zero points"),
            ({"weights__actorder": "group"}, "actorder"),
            ({"weights__actorder": "dynamic"}, "actorder"),
            ({"weights__actorder": True}, "actorder"),
            ({"weights__strategy": "tensor"}, "one scale a tensor"),
            ({"weights__group_size": None}, "in groups of None"),
            ({"weights__dynamic": True}, "dynamic"),
            ({"format": "float-quantized"}, "in the format float-quantized"),
            ({"format": None, "top__format": "nvfp4-pack-quantized"}, "in the format nvfp4-pack-quantized"),
            ({"input_activations": {"num_bits": 8}}, "quantized activations"),
            ({"targets": ["re:.*mlp.*"]}, r"weights of re:\.\*mlp"),
            ({"top__kv_cache_scheme": {"num_bits": 8}}, "with a kv_cache_scheme"),
            ({"top__sparsity_config": {"format": "sparse-24-bitmask"}}, "with a sparsity_config"),
        ],
    )
    def test_what_it_is(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        path = self.config(tmp_path, **changes)
        with pytest.raises(AlreadyQuantized, match=f"{message}.*Only 16-bit, AWQ and compressed-tensors"):
            convert(path, tmp_path / "out", "gemm")
        assert not (tmp_path / "out").exists()

    def test_several_schemes(self, tmp_path: Path) -> None:
        path = self.config(tmp_path)
        config = json.loads((path / "config.json").read_text())["quantization_config"]
        config["config_groups"]["group_1"] = copy.deepcopy(config["config_groups"]["group_0"])
        tiny.edit_json(path / "config.json", quantization_config=config)
        with pytest.raises(AlreadyQuantized, match="of 2 compressed-tensors schemes"):
            Checkpoint.open(path)

    @pytest.mark.parametrize("groups", [None, {}, [], {"group_0": "W4A16"}])
    def test_no_config(self, tmp_path: Path, groups: object) -> None:
        with pytest.raises(CheckpointError, match="no config_groups"):
            Checkpoint.open(self.config(tmp_path, top__config_groups=groups))

    def test_what_harms_nothing_is_read(self, tmp_path: Path) -> None:
        path = self.config(tmp_path, weights__actorder="static", weights__observer="mse", top__sparsity_config={})
        assert Checkpoint.open(path).quantization is not None

    def test_rows_that_end_in_padding(self, tmp_path: Path) -> None:
        path = self.config(tmp_path)
        found = tiny.tensors(version="compressed-tensors")
        found["model.layers.1.mlp.up_proj.weight_shape"][1] = tiny.HIDDEN - 4
        tiny.write_tensors(path, found)
        with pytest.raises(FormatError, match=r"layers\.1\.mlp\.up_proj packs 256 x 128 weights and says \[256, 124\]"):
            convert(path, tmp_path / "out", "gemm")
        assert not (tmp_path / "out").exists()

    def test_weights_of_the_other_method(self, tmp_path: Path) -> None:
        path = self.config(tmp_path)
        tiny.write_tensors(path, tiny.tensors(version="gemm"))
        with pytest.raises(CheckpointError, match=r"a compressed-tensors quant.*packed as \*.qweight"):
            Checkpoint.open(path)
        awq = tiny.write(tmp_path / "awq", version="gemm")
        tiny.write_tensors(awq, tiny.tensors(version="compressed-tensors"))
        with pytest.raises(CheckpointError, match=r"an AWQ quant.*packed as \*.weight_packed"):
            Checkpoint.open(awq)

    @pytest.mark.parametrize(
        ("ignore", "message"),
        [
            ([], "vision tower is in 16 bits, and ignore does not list visual"),
            (["re:.*visual.*", "re:.*mlp.up_proj$"], "ignore has mlp.up_proj of .* and not mlp.gate_proj"),
            (["re:.*visual.*", "re:.*down_proj$"], "packed, but listed in ignore"),
            (
                ["re:.*visual.*", "model.layers.1.self_attn.o_proj"],
                r"packed, but listed in ignore: model.layers.1",
            ),
        ],
    )
    def test_a_list_at_odds_with_the_tensors(self, tmp_path: Path, ignore: list[str], message: str) -> None:
        found = inspect_checkpoint(self.config(tmp_path, top__ignore=ignore)).problems
        assert len(found) and any(re.search(message, problem.message) for problem in found), found


def test_the_words_are_those_of_gemv(tmp_path: Path) -> None:
    gemv = tiny.random_packed("gemv", 128, 16, 64, torch.Generator().manual_seed(3))
    layer = unpack_as("gemv", gemv, 64)
    packed: PackedLinear = pack_as("compressed-tensors", layer)
    assert torch.equal(packed.qweight, gemv.qweight)
    assert packed.qzeros.shape == (2, 2) and packed.scales.shape == (16, 2)
