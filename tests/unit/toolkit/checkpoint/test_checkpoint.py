"""Reading checkpoints: both shapes in circulation, and one clear message for each way to be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import AlreadyQuantized, CheckpointError
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.paths import demo_checkpoint


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_both_shapes_read_the_same(tmp_path: Path, nested: bool, shards: int) -> None:
    checkpoint = Checkpoint.open(tiny.write(tmp_path / "m", nested=nested, shards=shards))
    expected = tiny.tensors(nested)
    assert {n: (t.shape, t.dtype) for n, t in checkpoint.tensors.items()} == {
        n: (tuple(t.shape), "F16") for n, t in expected.items()
    }
    assert all(torch.equal(checkpoint.get(name), tensor) for name, tensor in expected.items())
    assert checkpoint.nbytes == sum(2 * t.numel() for t in expected.values())
    assert checkpoint.quantization is None
    assert checkpoint.tied_lm_head
    prefix = "model.language_model." if nested else "model."
    assert (checkpoint.language_prefix, checkpoint.layers_prefix) == (prefix, f"{prefix}layers.")
    assert checkpoint.visual_prefix == ("model.visual." if nested else "visual.")
    assert checkpoint.linear_names(1)[-1] == f"{prefix}layers.1.mlp.down_proj"
    assert {f"{n}.weight" for i in range(2) for n in checkpoint.linear_names(i)} <= set(expected)


@pytest.mark.parametrize("nested", [False, True])
def test_text_config_is_the_same_from_both(tmp_path: Path, nested: bool) -> None:
    checkpoint = Checkpoint.open(tiny.write(tmp_path / "m", nested=nested))
    assert {**tiny.TEXT, "rope_theta": 1e6, "tie_word_embeddings": True}.items() <= checkpoint.text_config.items()
    assert checkpoint.config == tiny.config(nested)
    assert checkpoint.linear_shapes() == tiny.SHAPES
    assert tuple(checkpoint.linear_shapes()) == QWEN2_VL.linears
    assert checkpoint.num_layers == 2


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_quantization_is_read(tmp_path: Path, version: str) -> None:
    checkpoint = Checkpoint.open(tiny.write(tmp_path / "m", version=version, group_size=32))
    info = checkpoint.quantization
    assert info is not None
    assert (info.bits, info.group_size, info.zero_point, info.format) == (4, 32, True, version)
    assert info.modules_to_not_convert == ("visual", "model.visual")
    assert sorted(checkpoint.quantized_modules()) == sorted(n for i in range(2) for n in checkpoint.linear_names(i))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_some_linears_may_be_in_16_bits(tmp_path: Path, nested: bool, version: str) -> None:
    left = frozenset({(0, name) for name in QWEN2_VL.linears} | {(1, "mlp.down_proj")})
    checkpoint = Checkpoint.open(tiny.write(tmp_path / "m", nested=nested, version=version, left=left))
    assert checkpoint.left_linears() == left
    packed = {checkpoint.layer_prefix(1) + name for name in QWEN2_VL.linears if name != "mlp.down_proj"}
    assert set(checkpoint.quantized_modules()) == packed
    whole = Checkpoint.open(tiny.write(tmp_path / "n", nested=nested, version=version))
    assert whole.left_linears() == frozenset()
    assert checkpoint.content_hash() != whole.content_hash()


def test_autoawqs_own_key_names_are_read(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "m", version="gemm")
    quantization = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    tiny.edit_json(path / "config.json", quantization_config=quantization)
    info = Checkpoint.open(path).quantization
    assert info is not None
    assert (info.bits, info.group_size, info.format, info.modules_to_not_convert) == (4, 64, "gemm", ())


def test_the_embedded_model_opens() -> None:
    checkpoint = Checkpoint.open(demo_checkpoint())
    assert checkpoint.num_layers == checkpoint.text_config["num_hidden_layers"]
    assert set(checkpoint.linear_names(0)) <= {name.removesuffix(".weight") for name in checkpoint.tensors}


class TestContentHash:
    def test_does_not_depend_on_sharding_or_place(self, tmp_path: Path) -> None:
        hashes = {Checkpoint.open(tiny.write(tmp_path / str(n), shards=n)).content_hash() for n in (1, 2, 5)}
        assert len(hashes) == 1
        assert len(hashes.pop()) == 40

    def test_changes_with_one_weight(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        before = Checkpoint.open(path).content_hash()
        weights = tiny.tensors()
        weights["visual.merger.mlp.2.weight"][-1, -1] += 0.25
        tiny.write_tensors(path, weights)
        assert Checkpoint.open(path).content_hash() != before

    def test_changes_when_two_tensors_trade_places(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        before = Checkpoint.open(path).content_hash()
        weights = tiny.tensors()
        first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
        weights[first], weights[second] = weights[second], weights[first]
        tiny.write_tensors(path, weights)
        assert Checkpoint.open(path).content_hash() != before

    def test_changes_with_the_config(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        before = Checkpoint.open(path).content_hash()
        tiny.edit_json(path / "config.json", rms_norm_eps=1e-5)
        assert Checkpoint.open(path).content_hash() != before

    def test_a_file_cut_meanwhile_is_an_error(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "m")
        checkpoint = Checkpoint.open(path)
        with (path / "model.safetensors").open("r+b") as stream:
            stream.truncate(1000)
        with pytest.raises(CheckpointError, match="was cut short"):
            checkpoint.content_hash()


class TestBroken:
    """Every message names the path, and says what is wrong and what to do."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tiny.write(tmp_path / "m", shards=3)

    def expect(self, path: Path, message: str, kind: type[CheckpointError] = CheckpointError) -> None:
        with pytest.raises(kind, match=message) as caught:
            Checkpoint.open(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_missing_directory(self, tmp_path: Path) -> None:
        self.expect(tmp_path / "nowhere", "no such directory.*Qwen/Qwen2-VL-2B-Instruct")

    def test_a_file_instead_of_a_directory(self, path: Path) -> None:
        self.expect(path / "config.json", "is a file, not a directory")

    def test_empty_directory(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        self.expect(tmp_path / "empty", "is empty")

    def test_no_config(self, path: Path) -> None:
        (path / "config.json").unlink()
        self.expect(path, r"no config\.json.*it holds generation_config")

    def test_an_adapter(self, path: Path) -> None:
        (path / "config.json").rename(path / "adapter_config.json")
        self.expect(path, "LoRA adapter.*--adapter")

    @pytest.mark.parametrize("text", ['{"a": 1,', "", "{'a': 1}", '{"a": NaN,}'])
    def test_malformed_config(self, path: Path, text: str) -> None:
        (path / "config.json").write_text(text)
        self.expect(path, r"config\.json is not valid JSON.*line \d+, column \d+")

    def test_config_that_is_no_text(self, path: Path) -> None:
        (path / "config.json").write_bytes(b"\xff\xfe\x00")
        self.expect(path, "is not text")

    def test_config_that_is_no_object(self, path: Path) -> None:
        (path / "config.json").write_text("[1]")
        self.expect(path, "holds a JSON list")

    def test_another_architecture(self, path: Path) -> None:
        changes = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
        tiny.edit_json(path / "config.json", **changes)
        self.expect(path, r"LlavaForConditionalGeneration \(model_type llava\).*What is supported: Qwen2VLForCond")

    def test_the_config_of_another_family(self, path: Path) -> None:
        changes = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
        tiny.edit_json(path / "config.json", **changes)
        self.expect(path, r"config\.json is a Qwen2\.5-VL's, and the weights are a Qwen2-VL's")

    def test_a_part_of_the_architecture(self, path: Path) -> None:
        tiny.edit_json(path / "config.json", architectures=["Qwen2VLModel"])
        self.expect(path, "Qwen2VLModel")

    def test_no_architecture_at_all(self, path: Path) -> None:
        tiny.edit_json(path / "config.json", architectures=None, model_type=None)
        self.expect(path, r"no architecture \(model_type None\)")

    @pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
    def test_config_without_a_size(self, path: Path, key: str) -> None:
        tiny.edit_json(path / "config.json", **{key: None})
        self.expect(path, f"{key} is None")

    def test_config_without_vision(self, path: Path) -> None:
        tiny.edit_json(path / "config.json", vision_config=None)
        self.expect(path, "no vision_config")

    def test_absent_shard(self, path: Path) -> None:
        (path / "model-00002-of-00003.safetensors").unlink()
        self.expect(path, r"half-downloaded: 1 of the 3 weight files.*model-00002-of-00003.*Finish the download")

    def test_a_byte_order_mark_is_read(self, path: Path) -> None:
        (path / "config.json").write_bytes(b"\xef\xbb\xbf" + (path / "config.json").read_bytes())
        assert Checkpoint.open(path).config == tiny.config()

    @pytest.mark.parametrize("index", [True, False])
    def test_a_tensor_in_two_files(self, path: Path, index: bool) -> None:
        file = path / "model-00003-of-00003.safetensors"
        found = load_file(file) | {"model.embed_tokens.weight": torch.ones(tiny.VOCAB, tiny.HIDDEN).half()}
        save_file(found, file)
        if not index:
            (path / "model.safetensors.index.json").unlink()
        self.expect(path, r"model\.embed_tokens\.weight is in two files, model-00001-of-00003.*model-00003-of-00003")

    def test_absent_shards_beside_a_whole_file(self, path: Path) -> None:
        tiny.write_tensors(path, tiny.tensors())
        (path / "model-00002-of-00003.safetensors").unlink()
        self.expect(path, r"holds a model\.safetensors, and an .*index.*model-00002-of-00003.*Delete the index")

    @pytest.mark.parametrize("change", ["value", "name", "shape"])
    def test_a_new_file_beside_old_shards(self, path: Path, change: str) -> None:
        found = tiny.tensors()
        tiny.write_tensors(path, found)
        assert len(Checkpoint.open(path).tensors) == len(found)  # the same, twice
        if change == "value":
            found["model.norm.weight"][-1] += 1
        elif change == "name":
            del found["model.norm.weight"]
        else:
            found["model.norm.weight"] = found["model.norm.weight"][:-1].clone()
        tiny.write_tensors(path, found)
        self.expect(path, r"holds two models: .* differ in model\.norm\.weight.*delete what is older")

    def change(self, path: Path, renamed: dict[str, str], replaced: dict[str, torch.Tensor] | None = None) -> None:
        found = tiny.tensors() | (replaced or {})
        for old, new in renamed.items():
            found = {name.replace(old, new): tensor for name, tensor in found.items()}
        for file in path.glob("model*"):
            file.unlink()
        tiny.write_tensors(path, found)

    def test_what_zero_3_leaves(self, path: Path) -> None:
        self.change(path, {}, {"model.layers.1.mlp.up_proj.weight": torch.ones(0).half()})
        self.expect(path, r"model\.layers\.1\.mlp\.up_proj\.weight is empty.*ZeRO-3.*zero_to_fp32")

    @pytest.mark.parametrize(
        "renamed", [{"q_proj.weight": "q_proj.base_layer.weight"}, {"model.layers": "base_model.model.model.layers"}]
    )
    def test_an_adapter_that_is_not_merged(self, path: Path, renamed: dict[str, str]) -> None:
        self.change(path, renamed)
        self.expect(path, "an adapter that is not merged.*merge_and_unload")

    @pytest.mark.parametrize("prefix", ["language_model.", "", "module.model."])
    def test_names_that_no_engine_loads(self, path: Path, prefix: str) -> None:
        self.change(path, {"model.layers.": f"{prefix}layers."})
        self.expect(path, rf"names its layers {prefix}layers\.\*.*neither vLLM nor transformers")

    @pytest.mark.parametrize(
        ("key", "value"), [("vocab_size", 65), ("rms_norm_eps", 1e-5), ("tie_word_embeddings", False)]
    )
    def test_flat_and_nested_config_at_odds(self, path: Path, key: str, value: float) -> None:
        tiny.edit_json(path / "config.json", text_config={**tiny.TEXT, "tie_word_embeddings": True})
        assert Checkpoint.open(path).tied_lm_head
        tiny.edit_json(path / "config.json", text_config={**tiny.TEXT, key: value})
        self.expect(path, rf"says {key} .*, and {value} in text_config")

    def test_a_head_that_nobody_tied(self, path: Path) -> None:
        tiny.edit_json(path / "config.json", tie_word_embeddings=None)
        self.expect(path, r"no lm_head\.weight.*does not say tie_word_embeddings.*transformers 5 takes for false")
        self.change(path, {}, {"lm_head.weight": torch.ones(tiny.VOCAB, tiny.HIDDEN).half()})
        assert not Checkpoint.open(path).tied_lm_head

    def test_absent_shard_without_an_index(self, path: Path) -> None:
        (path / "model.safetensors.index.json").unlink()
        assert len(Checkpoint.open(path).tensors) == len(tiny.tensors())
        (path / "model-00003-of-00003.safetensors").unlink()
        self.expect(path, r"half-downloaded: 1 of 3 weight files are missing \(number 3")

    def test_malformed_index(self, path: Path) -> None:
        (path / "model.safetensors.index.json").write_text("{")
        self.expect(path, "index.json is not valid JSON")
        (path / "model.safetensors.index.json").write_text('{"weight_map": []}')
        self.expect(path, "no usable weight_map")

    def test_index_of_another_download(self, path: Path) -> None:
        index = json.loads((path / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = "model-00001-of-00003.safetensors"
        tiny.write_json(path / "model.safetensors.index.json", index)
        self.expect(path, "names 1 tensors that no file holds, such as lm_head.weight")

    def test_truncated_file(self, path: Path) -> None:
        file = path / "model-00001-of-00003.safetensors"
        size = file.stat().st_size
        with file.open("r+b") as stream:
            stream.truncate(size - 10)
        self.expect(path, f"truncated: its header describes {size:,} bytes and the file holds {size - 10:,}")

    @pytest.mark.parametrize("size", [0, 5, 8, 300])
    def test_file_truncated_in_its_header(self, path: Path, size: int) -> None:
        with (path / "model-00001-of-00003.safetensors").open("r+b") as stream:
            stream.truncate(size)
        self.expect(path, "truncated or not a safetensors file")

    def test_file_with_bytes_too_many(self, path: Path) -> None:
        with (path / "model-00001-of-00003.safetensors").open("ab") as stream:
            stream.write(b"xyz")
        self.expect(path, "3 bytes follow its last tensor")

    def test_damaged_header(self, path: Path) -> None:
        with (path / "model-00001-of-00003.safetensors").open("r+b") as stream:
            stream.seek(8)
            stream.write(b"}}}}")
        self.expect(path, "damaged safetensors header")

    def test_lfs_pointer(self, path: Path) -> None:
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3998\n"
        (path / "model-00001-of-00003.safetensors").write_text(pointer)
        self.expect(path, "Git-LFS pointer of 67 bytes.*git lfs pull")

    @pytest.mark.parametrize("name", ["model.incomplete", "x.safetensors.aria2", "x.part"])
    def test_download_in_progress(self, path: Path, name: str) -> None:
        (path / name).touch()
        self.expect(path, f"half-downloaded: it holds {name}")

    def test_no_weights(self, path: Path) -> None:
        for file in path.glob("model*"):
            file.unlink()
        self.expect(path, r"no weights \(no \*\.safetensors")
        download = path / ".cache" / "huggingface" / "download"
        download.mkdir(parents=True)
        (download / "abc.incomplete").touch()
        self.expect(path, "its download was interrupted")

    @pytest.mark.parametrize(("name", "kind"), [("pytorch_model.bin", "PyTorch pickle"), ("m.gguf", "GGUF")])
    def test_other_weights(self, path: Path, name: str, kind: str) -> None:
        for file in path.glob("model*"):
            file.unlink()
        (path / name).touch()
        self.expect(path, f"holds {kind}.* and no safetensors.*save_pretrained")

    def test_weights_without_layers(self, path: Path) -> None:
        shutil.rmtree(path)
        tiny.write(path)
        tiny.write_tensors(path, {"base_model.x": torch.zeros(2)})
        self.expect(path, "no decoder layers.*base_model.x")

    def test_packed_weights_without_their_config(self, tmp_path: Path) -> None:
        path = tiny.write(tmp_path / "q", version="gemm")
        tiny.edit_json(path / "config.json", quantization_config=None)
        self.expect(path, "no quantization_config")

    def test_quantized_config_without_packed_weights(self, path: Path) -> None:
        quantization = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}
        tiny.edit_json(path / "config.json", quantization_config=quantization)
        self.expect(path, "no weight is packed")

    def test_another_quantization_method(self, path: Path) -> None:
        tiny.edit_json(path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
        self.expect(path, "gptq weights. Only 16-bit, AWQ and compressed-tensors", AlreadyQuantized)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": "gemv_fast"}, "layout 'gemv_fast'. Only 'gemm' and 'gemv'"),
            ({"bits": 8}, "says 8 bits"),
            ({"group_size": 0}, "group size 0"),
            ({"group_size": "128"}, "group size '128'"),
            ({"modules_to_not_convert": "visual"}, "not a list"),
        ],
    )
    def test_odd_quantization(self, tmp_path: Path, change: dict[str, object], message: str) -> None:
        path = tiny.write(tmp_path / "q", version="gemm")
        quantization = json.loads((path / "config.json").read_text())["quantization_config"]
        tiny.edit_json(path / "config.json", quantization_config={**quantization, **change})
        self.expect(path, message)

    def test_asking_for_a_tensor_that_is_not_there(self, path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no tensor lm_head\.weight"):
            Checkpoint.open(path).get("lm_head.weight")
