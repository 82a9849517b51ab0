"""Adapters: what is merged answers as peft does, under names of any version; what is not whole is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.short import short_demo
from toolkit.checkpoint.checkpoint import Checkpoint, CheckpointWriter
from toolkit.checkpoint.problems import find_problems
from toolkit.compat import patch_torchvision
from toolkit.errors import CheckpointError
from toolkit.sources.adapter import check_adapter, merge, with_side_files
from toolkit.sources.adapter_files import own_files, targets

LANGUAGE = ["q_proj", "down_proj"]
#: Settings of a LoRA, each of which changes what is saved or how it is scaled.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "patterns": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 32}},
    "full names": {"alpha_pattern": {"model.language_model.layers.0.mlp.down_proj": 1}},
    "trained biases": {"bias": "all"},
    "biases of its own": {"target_modules": ["q_proj"], "lora_bias": True},
    "one layer": {"layers_to_transform": [1]},
    "regex": {"target_modules": r"model\.language_model\.layers\.\d+\.mlp\.(up|gate)_proj"},
    "all linears": {"target_modules": "all-linear"},
    "the vision tower": {"target_modules": ["attn.qkv", "attn.proj", "fc1", "merger.mlp.0", "patch_embed.proj"]},
    "all but some": {"target_modules": ["q_proj", "k_proj", "qkv"], "exclude_modules": ["k_proj"]},
    "the head": {"target_modules": [*LANGUAGE, "lm_head"]},
    "the embeddings": {"target_modules": [*LANGUAGE, "embed_tokens"]},
    "head and embeddings": {"target_modules": ["lm_head", "embed_tokens"]},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "both whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "a whole merger": {"modules_to_save": ["visual.merger"]},
}


def loaded(path: Path) -> Any:
    patch_torchvision()
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two layers of the embedded model, fp32: what is merged is then rounded nowhere."""
    short = Checkpoint.open(short_demo(tmp_path_factory.mktemp("base") / "short", layers=2))
    path = short.path.parent / "wide"
    with CheckpointWriter(path) as writer:
        for name in short.tensors:
            writer.add(name, short.get(name).float())
        writer.copy_side_files(short.path)
        writer.set_config({**short.config, "torch_dtype": "float32"})
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def inputs(base: Checkpoint) -> dict[str, torch.Tensor]:
    patch_torchvision()
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(base.path)
    content = [{"type": "image"}, {"type": "text", "text": "Which shape?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    image = Image.effect_mandelbrot((112, 84), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    return dict(processor(text=[text], images=[image], return_tensors="pt"))


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


@pytest.fixture(scope="module")
def plain(base: Checkpoint, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the base answers without an adapter."""
    return logits(loaded(base.path), inputs)


def trained(base: Checkpoint, directory: Path, inputs: dict[str, torch.Tensor], **settings: Any) -> torch.Tensor:
    """Save an adapter whose weights are all random, as after a training; return what peft answers with it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    given = {"r": 4, "lora_alpha": 8, "target_modules": LANGUAGE, "init_lora_weights": False} | settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied weights, which is the point
        model = get_peft_model(loaded(base.path), LoraConfig(**given)).eval()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name and "lora_B.default.weight" not in name:
                parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter)).add_(0.01)
        model.save_pretrained(directory, save_embedding_layers=False)
        return logits(model, inputs)


def as_before(directory: Path) -> None:
    """Rename what an adapter holds as transformers before 4.52 would have it."""

    def old(name: str) -> str:
        return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")

    file = directory / "adapter_model.safetensors"
    save_file({old(name): tensor for name, tensor in load_file(file).items()}, file)
    config = json.loads((directory / "adapter_config.json").read_text())
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {old(name): value for name, value in config[key].items()}
    wanted = config["target_modules"]
    written = wanted.replace(r"language_model\.", "") if isinstance(wanted, str) else [old(name) for name in wanted]
    config["target_modules"] = written
    (directory / "adapter_config.json").write_text(json.dumps(config))


#: Those whose names are looked at by more than peft's keys.
NAMED = ("plain", "patterns", "full names", "regex", "the vision tower", "the head", "the embeddings", "a whole merger")


@pytest.mark.parametrize(("kind", "before"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in NAMED)])
def test_merged_weights_answer_as_the_adapter_does(
    kind: str, before: bool, tmp_path: Path, base: Checkpoint, inputs: dict[str, torch.Tensor], plain: torch.Tensor
) -> None:
    expected = trained(base, tmp_path / "lora", inputs, **KINDS[kind])
    if before:
        as_before(tmp_path / "lora")
    out = Checkpoint.open(merge(base, tmp_path / "lora", tmp_path / "out"))
    found = logits(loaded(out.path), inputs)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert torch.allclose(found, expected, atol=2e-4), float((found - expected).abs().max())
    assert find_problems(out) == []
    apart = any(word in str(KINDS[kind]) for word in ("lm_head", "embed_tokens"))
    assert out.tied_lm_head is not apart and ("lm_head.weight" in out.tensors) is apart


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, base: Checkpoint, inputs: dict[str, torch.Tensor]) -> Path:
    """A plain adapter."""
    directory = tmp_path_factory.mktemp("saved") / "lora"
    trained(base, directory, inputs)
    return directory


def changed(saved: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], object], **config: Any) -> Path:
    """Copy an adapter, with other tensors and settings."""
    shutil.copytree(saved, to)
    found = load_file(to / "adapter_model.safetensors")
    change(found)
    save_file(found, to / "adapter_model.safetensors")
    settings = json.loads((to / "adapter_config.json").read_text()) | config
    (to / "adapter_config.json").write_text(json.dumps(settings))
    return to


LAYER_1 = "base_model.model.model.language_model.layers.1"
Q_A, Q_B = (f"{LAYER_1}.self_attn.q_proj.lora_{side}.weight" for side in "AB")


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda found: [found.pop(name) for name in names]


def same(found: dict[str, torch.Tensor]) -> None:
    """Change no tensor."""


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without(Q_B), {}, r"of model\.language_model\.layers\.1\.self_attn\.q_proj it holds lora_A alone"),
        (without(Q_A, Q_B), {}, r"targets model\.language_model\.layers\.1\.self_attn\.q_proj, and has no weights"),
        (same, {"target_modules": ["q_proj"]}, "has weights for .*down_proj, which that does not target"),
        (same, {"target_modules": ["q_proj", "down_proj", "qkv"]}, r"targets model\.visual\.blocks\.0\.attn\.qkv and"),
        (same, {"use_dora": True}, "a DoRA without the magnitudes"),
        (same, {"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        (same, {"layer_replication": [[0, 2]]}, "uses layer_replication"),
        (lambda found: found.update({Q_A: torch.zeros(0)}), {}, "empty, as DeepSpeed ZeRO-3"),
        (lambda found: found.update({name.replace("s.1", "s.7"): found[name].clone() for name in (Q_A, Q_B)}), {},
         r"made for another model: .* has no model\.language_model\.layers\.7"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused_before_anything_is_loaded(
    change: Callable[..., object], config: dict[str, Any], message: str, tmp_path: Path, base: Checkpoint, saved: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_adapter(changed(saved, tmp_path / "lora", change, **config), base)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda found: found[Q_B].view(-1)[3:5].fill_(float("nan")), {}, r"makes .*q_proj\.lora_B\.weight NaN"),
        (lambda found: found.update({Q_A: found[Q_A][:, :-1].contiguous()}), {}, "does not fit"),
        (
            lambda found: found.update({"base_model.model.score.weight": torch.ones(2, 2)}),
            {},
            "it has no .*score",
        ),
        (same, {"modules_to_save": ["lm_head"]}, r"incomplete: base_model\.model\.lm_head\.weight is missing"),
        (lambda found: [tensor.zero_() for tensor in found.values()], {}, "changes no weight"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    change: Callable[..., object], config: dict[str, Any], message: str, tmp_path: Path, base: Checkpoint, saved: Path
) -> None:
    adapter = changed(saved, tmp_path / "lora", change, **config)
    with pytest.raises(CheckpointError, match=message):
        merge(base, adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("name", ["non_lora_state_dict.bin", "non_lora_trainables.bin", "vit.safetensors", "merger.pt"])
def test_further_weights_are_no_secret(name: str, tmp_path: Path, base: Checkpoint, saved: Path) -> None:
    adapter = changed(saved, tmp_path / "lora", same)
    for state in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state.pth"):
        (adapter / state).touch()
    check_adapter(adapter, base)
    (adapter / name).touch()
    with pytest.raises(CheckpointError, match=f"holds weights beside the adapter, {name}"):
        check_adapter(adapter, base)


def test_a_pickle_is_read_too(tmp_path: Path, base: Checkpoint, saved: Path) -> None:
    whole, pickled = changed(saved, tmp_path / "a", same), changed(saved, tmp_path / "b", same)
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    one, two = (Checkpoint.open(merge(base, path, tmp_path / f"{path.name}-out")) for path in (whole, pickled))
    assert one.content_hash() == two.content_hash()


TEMPLATE = "{% for message in messages %}{{ message }}{% endfor %}"


class TestOwnFiles:
    """The tokenizer, template and processor that an adapter was trained with go with it."""

    def adapter(self, tmp_path: Path, saved: Path, base: Checkpoint) -> Path:
        adapter = changed(saved, tmp_path / "lora", same)
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
            (adapter / name).write_text(json.dumps(json.loads((base.path / name).read_text()), indent=7))
        return adapter

    def edit(self, file: Path, **changes: Any) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def test_the_same_in_another_layout_is_nothing(self, tmp_path: Path, saved: Path, base: Checkpoint) -> None:
        adapter = self.adapter(tmp_path, saved, base)
        assert own_files(adapter, base.path) == {}
        with with_side_files(base, adapter) as place:
            assert place == base.path

    def test_a_template_takes_the_place_of_the_bases(self, tmp_path: Path, saved: Path, base: Checkpoint) -> None:
        from transformers import AutoProcessor

        adapter = self.adapter(tmp_path, saved, base)
        (adapter / "chat_template.jinja").write_text(TEMPLATE + "image")
        assert own_files(adapter, base.path) == {"chat_template.jinja": "another chat template"}
        with with_side_files(base, adapter) as place:
            assert AutoProcessor.from_pretrained(place).chat_template == TEMPLATE + "image"
        out = merge(base, adapter, tmp_path / "out")
        assert (out / "chat_template.jinja").read_text() == TEMPLATE + "image"
        assert not (out / "chat_template.json").exists()

    def test_a_template_without_images_is_not_taken(
        self, tmp_path: Path, saved: Path, base: Checkpoint, capsys: pytest.CaptureFixture[str]
    ) -> None:
        adapter = self.adapter(tmp_path, saved, base)
        (adapter / "chat_template.jinja").write_text(TEMPLATE)
        with with_side_files(base, adapter) as place:
            assert (place / "chat_template.json").exists() and not (place / "chat_template.jinja").exists()
        assert "leaves images out" in capsys.readouterr().err

    def test_other_bounds_of_images(self, tmp_path: Path, saved: Path, base: Checkpoint) -> None:
        adapter = self.adapter(tmp_path, saved, base)
        self.edit(adapter / "preprocessor_config.json", max_pixels=401408)
        assert own_files(adapter, base.path) == {"preprocessor_config.json": "another longest_edge"}
        out = merge(base, adapter, tmp_path / "out")
        assert json.loads((out / "preprocessor_config.json").read_text())["max_pixels"] == 401408

    def test_new_tokens(self, tmp_path: Path, saved: Path, base: Checkpoint) -> None:
        adapter = self.adapter(tmp_path, saved, base)
        tokenizer = json.loads((adapter / "tokenizer.json").read_text())
        last = tokenizer["added_tokens"][-1]
        room = {**last, "id": 1023, "content": "<new>"}
        self.edit(adapter / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"][:-1], room])
        assert own_files(adapter, base.path) == {"tokenizer.json": "another token '<new>'"}
        check_adapter(adapter, base)
        self.edit(adapter / "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], {**room, "id": 1024}])
        with pytest.raises(CheckpointError, match=r"'<new>' \(1024\), beyond the 1024 embeddings of its base"):
            check_adapter(adapter, base)


MODULES = (
    "model.layers.0.self_attn.q_proj",
    "model.language_model.layers.11.mlp.down_proj",
    "model.visual.blocks.1.attn.qkv",
    "visual.merger.mlp.0",
    "model.embed_tokens",
    "lm_head",
)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "qkv", "mlp.0"]},
        {"target_modules": ["proj"]},
        {"target_modules": ["lm_head", "model.layers.0.self_attn.q_proj"]},
        {"target_modules": r"^(?!.*visual).*(?:q_proj|down_proj)$"},
        {"target_modules": ["q_proj", "down_proj", "qkv"], "layers_to_transform": [1, 11]},
        {"target_modules": ["q_proj", "down_proj", "qkv"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [11], "layers_pattern": ["h", "layers"]},
        {"target_modules": ["q_proj", "down_proj", "qkv"], "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "qkv"], "exclude_modules": ".*visual.*"},
        {"target_modules": ["q_proj", "mlp.0"], "modules_to_save": ["visual.merger"]},
    ],
)
def test_a_target_list_is_read_as_peft_reads_it(settings: dict[str, Any]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    config = LoraConfig(**settings)
    for module in MODULES:
        assert targets(settings, module) is bool(check_target_module_exists(config, module)), module
