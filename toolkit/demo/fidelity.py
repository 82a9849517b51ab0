"""How far a quantized embedded model has drifted from fp16: KL divergence on the tokens of right answers.

Accuracy is too coarse to rank good quantizations of a model this small; the divergence is not.

    python -m toolkit.demo fidelity --per-task 1000 CHECKPOINT...
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from toolkit.calibration.inputs import PreparedSample, prepare
from toolkit.calibration.manifest import read_manifest
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.compat import patch_torchvision
from toolkit.errors import FormatError
from toolkit.formats.packing import dequantize
from toolkit.formats.reference import load_reference
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.paths import demo_checkpoint
from toolkit.quantize.search.grid import round_to_grid
from toolkit.tasks.manifests import write_tasks

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

__all__ = ["divergence", "load"]


def load(path: Path | None, nearest: int | None = None) -> Qwen2VLForConditionalGeneration:
    """Return the embedded model in float32, as transformers runs it.

    Args:
        path: a quantized checkpoint of it, read back to the weights it stands for; None for the fp16 source.
        nearest: round the source's linears to nearest with this group size (what AWQ has to beat).
    """
    patch_torchvision()
    from transformers import AutoModelForImageTextToText

    if path is not None:
        checkpoint = Checkpoint.open(path)
        if checkpoint.quantization is None or checkpoint.num_layers != Checkpoint.open(demo_checkpoint()).num_layers:
            raise FormatError(f"{path} is no quantized checkpoint of the embedded model")
        quantized: Qwen2VLForConditionalGeneration = load_reference(checkpoint)
        return quantized
    model = AutoModelForImageTextToText.from_pretrained(demo_checkpoint(), dtype=torch.float32).eval()
    if nearest is not None:
        for layer in model.model.language_model.layers:
            for name in QWEN2_VL.linears:
                weight = layer.get_submodule(name).weight
                assert isinstance(weight, torch.nn.Parameter)
                weight.data = dequantize(round_to_grid(weight.data, nearest), torch.float32)
    return model


def held_out_chats(processor: Qwen2VLProcessor, per_task: int) -> list[PreparedSample]:
    """Return held-out questions with their right answers, as model inputs."""
    with tempfile.TemporaryDirectory() as directory:
        tasks = write_tasks(Path(directory), per_task=per_task)
        lines = []
        for question in map(json.loads, tasks.read_text(encoding="utf-8").splitlines()):
            content = [{"type": "image", "image": question["image"]}, {"type": "text", "text": question["question"]}]
            answer = {"role": "assistant", "content": question["answers"][0]}
            lines.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
        chats = tasks.with_name("chats.jsonl")
        chats.write_text("\n".join(lines), encoding="utf-8")
        return list(prepare(read_manifest(chats), processor, max_tokens=10**6, max_pixels=None))


#: Chats that go through the model at once.
_BATCH = 64


@torch.no_grad()
def answer_logits(
    model: Qwen2VLForConditionalGeneration, chats: Sequence[PreparedSample], opening: Sequence[int], end: int
) -> list[torch.Tensor]:
    """Return log-probabilities [answer tokens, vocabulary] of each chat's answer, its end token included."""
    found: list[torch.Tensor] = [torch.empty(0)] * len(chats)
    # of like length together, so that little is padding; padding comes last, where a causal model does not see it
    order = sorted(range(len(chats)), key=lambda i: chats[i].tokens)
    for first in range(0, len(chats), _BATCH):
        batch = [(i, chats[i]) for i in order[first : first + _BATCH]]
        logits = model(**_joined([chat for _, chat in batch], model.device), use_cache=False).logits
        for row, (index, chat) in zip(logits, batch, strict=True):
            ids = chat.inputs["input_ids"][0].tolist()
            start = max(i for i in range(len(ids)) if ids[i : i + len(opening)] == list(opening)) + len(opening)
            stop = ids.index(end, start) + 1
            found[index] = row[start - 1 : stop - 1].float().log_softmax(-1).cpu()
    return found


def _joined(chats: Sequence[PreparedSample], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the inputs of several chats as one batch, padded on the right."""
    longest = max(chat.tokens for chat in chats)
    rows: dict[str, list[torch.Tensor]] = {}
    for chat in chats:
        inputs = {**chat.inputs, "attention_mask": torch.ones_like(chat.inputs["input_ids"])}
        for name, value in inputs.items():
            if value.shape[1:] == (chat.tokens,):
                value = torch.nn.functional.pad(value, (0, longest - chat.tokens))
            rows.setdefault(name, []).append(value.to(device))
    return {name: torch.cat(values) for name, values in rows.items()}


def divergence(reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor]) -> float:
    """Return the mean over answer tokens of KL(reference || candidate), in nats."""
    total = sum(float((r.exp() * (r - c)).sum()) for r, c in zip(reference, candidate, strict=True))
    return total / sum(len(r) for r in reference)


def told(reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor]) -> str:
    """Return a line on the candidate: mean KL a token and its standard error over answers, median and share of the
    worst answers (the mean is mostly theirs), and how many answers it would give differently.
    """
    sums = torch.tensor([float((r.exp() * (r - c)).sum()) for r, c in zip(reference, candidate, strict=True)])
    tokens = torch.tensor([float(len(r)) for r in reference])
    error = (sums / tokens.mean()).std() / len(sums) ** 0.5
    worst = sums.sort(descending=True).values[: max(1, len(sums) // 100)].sum() / sums.sum()
    changed = sum(bool((r.argmax(-1) != c.argmax(-1)).any()) for r, c in zip(reference, candidate, strict=True))
    return (
        f"{divergence(reference, candidate):.6f} +- {float(error):.6f}   {float((sums / tokens).median()):.2e}"
        f"   {float(worst):4.0%}   {changed:5d}"
    )


def compare(checkpoints: Sequence[str], per_task: int, device: str | None = None) -> None:
    """Print the divergence of plain rounding and of each checkpoint from fp16.

    Args:
        checkpoints: AWQ checkpoints of the embedded model.
        per_task: held-out questions of each of the eight tasks.
        device: as torch names it; None takes a GPU where there is one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    patch_torchvision()
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(demo_checkpoint())
    chats = held_out_chats(processor, per_task)
    opening = processor.tokenizer.encode("<|im_start|>assistant\n")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    reference = answer_logits(load(None).to(device), chats, opening, end)
    print(f"{len(chats)} held-out answers, {sum(len(r) for r in reference)} tokens; KL from fp16, nats a token")
    print("mean and standard error    median    worst 1%  changed")
    candidates = [("round to nearest, groups of 128", None, 128), *((c, Path(c), None) for c in checkpoints)]
    for name, path, nearest in candidates:
        model = load(path, nearest).to(device)
        print(f"{told(reference, answer_logits(model, chats, opening, end))}   {name}", flush=True)
