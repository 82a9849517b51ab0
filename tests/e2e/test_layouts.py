"""The real vLLM serves AWQ checkpoints in the layouts that others wrote, and answers as it does for ours.

Each is made of the same quantized weights as ``awq_gemm``, so answers must be equal to the letter:

- stock AutoAWQ: what AutoAWQ 0.2.9 under transformers 4.51.3 wrote for the embedded model. Its JSON files are
  in stock_autoawq/ as it wrote them: one weights file whose metadata names the tied head, a ``rope_scaling`` of type
  "default", ``modules_to_not_convert`` of "visual" alone, tokenizer settings of that release.
- official: as the published Qwen2-VL AWQ models are laid out: shards with an index, "mrope", the chat template in
  a file of its own, and, as from the 7B on, a head of its own in 16 bits.
- compressed-tensors: what `qvl convert` makes, for vLLM's WNA16 scheme with zero points.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from serve.settings.config import ServerConfig
from tests.e2e.conftest import BOOT_SECONDS, Question, Said, booted, free_port, said
from tests.e2e.test_serve import qvl
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.inspection import inspect_checkpoint
from toolkit.formats.convert import convert
from toolkit.paths import demo_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("served")]

STOCK = Path(__file__).with_name("stock_autoawq")
TOKENIZER = ("merges.txt", "tokenizer.json", "vocab.json", "chat_template.json")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(directory)
    return {name: checkpoint.get(name).contiguous() for name in checkpoint.tensors}


def stock_autoawq(quantized: Path, out: Path) -> Path:
    out.mkdir()
    for file in STOCK.iterdir():
        shutil.copy(file, out)
    for name in TOKENIZER:
        shutil.copy(demo_checkpoint() / name, out)
    metadata = {"format": "pt", "lm_head.weight": "model.embed_tokens.weight"}
    save_file(tensors_of(quantized), out / "model.safetensors", metadata)
    return out


def official(quantized: Path, out: Path) -> Path:
    out.mkdir()
    for name in (*TOKENIZER, "tokenizer_config.json", "preprocessor_config.json", "generation_config.json"):
        shutil.copy(demo_checkpoint() / name, out)
    config: dict[str, Any] = json.loads((demo_checkpoint() / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "transformers_version": "4.45.0.dev0"}
    config["quantization_config"] = {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": ["visual"],
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    tensors = tensors_of(quantized)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    names = sorted(tensors)
    half = len(names) // 2
    shards = {f"model-{i:05d}-of-00002.safetensors": part for i, part in ((1, names[:half]), (2, names[half:]))}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, out / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, part in shards.items() for name in part},
    }
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    return out


def compressed_tensors(quantized: Path, out: Path) -> Path:
    return convert(quantized, out, "compressed-tensors")


@pytest.mark.supports("qwen2_vl", "gemm", "vllm", "CPU")
@pytest.mark.supports("qwen2_vl", "compressed-tensors", "vllm", "CPU")
@pytest.mark.parametrize("layout", [stock_autoawq, official, compressed_tensors])
def test_the_layouts_of_others_answer_like_ours(
    layout: Any, ours: Said, awq_gemm: Path, questions: list[Question], tmp_path: Path
) -> None:
    directory = layout(awq_gemm, tmp_path / layout.__name__)
    assert inspect_checkpoint(directory).problems == []
    with booted(directory, ServerConfig(port=free_port(), timeout=BOOT_SECONDS)) as server:
        sample = said(server, questions[::4])
        assert sample.answers == ours.answers[::4] and sample.first == ours.first[::4]
        wna16 = "for CompressedTensorsWNA16" in server.log.read_text(errors="replace")
        assert wna16 == (layout is compressed_tensors)


@pytest.mark.release  # causes are told apart in tests/unit/bench/verify
def test_verify_names_another_dtype() -> None:
    with booted("demo", ServerConfig(port=free_port(), timeout=BOOT_SECONDS, dtype="bfloat16")) as server:
        found = qvl("verify", "demo", "--url", server.url, "--samples", "4", "--dtype", "float16", "--json")
    assert found.returncode == 1, found
    told = [cause for sample in json.loads(found.stdout)["samples"] for cause in sample["causes"]]
    assert {cause["kind"] for cause in told} - {"tie"} == {"dtype"}, told
