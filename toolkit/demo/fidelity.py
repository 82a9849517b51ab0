"""How far a quantized embedded model has drifted from fp16: KL divergence on the tokens of right answers.

Accuracy is too coarse to rank good quantizations of a model this small; the divergence is not.

    python -m toolkit.demo fidelity --per-task 1000 CHECKPOINT...
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from toolkit.calibration.inputs import PreparedSample, prepare
from toolkit.calibration.manifest import read_manifest
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.compat import patch_torchvision
from toolkit.errors import FormatError
from toolkit.fidelity.answers import answer_tokens
from toolkit.fidelity.paired import Band, by_group, summarize
from toolkit.fidelity.paired import compare as compare_answers
from toolkit.fidelity.turns import Turns
from toolkit.formats.packing import dequantize
from toolkit.formats.reference import load_reference
from toolkit.models.qwen2_vl import QWEN2_VL
from toolkit.paths import demo_checkpoint
from toolkit.quantize.search.grid import round_to_grid
from toolkit.tasks.manifests import TASKS_SEED, write_tasks
from toolkit.tasks.questions import TASKS
from toolkit.version import __version__

if TYPE_CHECKING:
    from transformers import Qwen2VLForConditionalGeneration, Qwen2VLProcessor

__all__ = ["divergence", "load"]


def load(path: Path | None, nearest: int | None = None) -> Qwen2VLForConditionalGeneration:
    """Return the embedded model in float32, as transformers runs it.

    Args:
        path: a quantized checkpoint of it, read back to the weights it stands for; None for the fp16 source.
        nearest: round the source's linears to nearest with this group size (what AWQ has to beat).
    """
    if path is not None:
        checkpoint = Checkpoint.open(path)
        source = Checkpoint.open(demo_checkpoint())
        if checkpoint.quantization is None or checkpoint.num_layers != source.num_layers:
            raise FormatError(f"{path} is no quantized checkpoint of the embedded model")
    model: Qwen2VLForConditionalGeneration = load_reference(Checkpoint.open(path or demo_checkpoint()))
    if nearest is not None:
        for layer in model.model.language_model.layers:
            for name in QWEN2_VL.linears:
                weight = layer.get_submodule(name).weight
                assert isinstance(weight, torch.nn.Parameter)
                weight.data = dequantize(round_to_grid(weight.data, nearest), torch.float32)
    return model


def held_out_chats(processor: Qwen2VLProcessor, per_task: int, seed: int = TASKS_SEED) -> list[PreparedSample]:
    """Return held-out questions with their right answers, as model inputs: ``per_task`` of each of `TASKS` in turn."""
    with tempfile.TemporaryDirectory() as directory:
        tasks = write_tasks(Path(directory), per_task=per_task, seed=seed)
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


@dataclass(frozen=True)
class Measured:
    """A candidate on held-out answers, one after the other.

    ``sums``: KL(fp16 || candidate) over an answer's tokens, nats. ``changed``: whether it would answer otherwise than
    fp16, reading the right answer. ``right``: whether the right answer is, to the letter, what it says greedily.
    """

    name: str
    sums: list[float]
    changed: list[bool]
    right: list[bool]


def measure(
    name: str, reference: Sequence[torch.Tensor], candidate: Sequence[torch.Tensor], answers: Sequence[torch.Tensor]
) -> Measured:
    """Return what log-probabilities [n, V] of each answer say; ``answers``: its ids [n]."""
    pairs = list(zip(reference, candidate, strict=True))
    return Measured(
        name,
        [max(0.0, float((r.exp() * (r - c)).double().sum())) for r, c in pairs],
        [bool((r.argmax(-1) != c.argmax(-1)).any()) for r, c in pairs],
        # greedy decoding gives an answer exactly where each of its tokens is the likeliest after those before
        [bool((c.argmax(-1) == ids).all()) for c, ids in zip(candidate, answers, strict=True)],
    )


def compare(
    checkpoints: Sequence[str],
    per_task: int,
    device: str | None = None,
    seed: int = TASKS_SEED,
    out: Path | None = None,
) -> None:
    """Print the divergence of plain rounding and of each checkpoint from fp16, and hold all against the first.

    Args:
        checkpoints: AWQ checkpoints of the embedded model.
        per_task: held-out questions of each of the eight tasks.
        device: as torch names it; None takes a GPU where there is one.
        seed: of the held-out questions.
        out: JSON file for all that is printed and every answer's divergence.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    patch_torchvision()
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(demo_checkpoint())
    chats = held_out_chats(processor, per_task, seed)
    opening = processor.tokenizer.encode("<|im_start|>assistant\n")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    turns = Turns(tuple(opening), end)
    ids = [chat.inputs["input_ids"][0] for chat in chats]
    answers = [row[answer_tokens(row, turns)] for row in ids]
    reference = answer_logits(load(None).to(device), chats, opening, end)
    tokens = [len(r) for r in reference]
    said = f"{len(chats)} held-out answers (seed {seed}), {sum(tokens)} tokens"
    print(f"{said}; KL from fp16 in nats a token, 95% intervals")
    found = [measure("fp16", reference, reference, answers)]
    candidates = [("round to nearest, groups of 128", None, 128), *((c, Path(c), None) for c in checkpoints)]
    for name, path, nearest in candidates:
        logits = answer_logits(load(path, nearest).to(device), chats, opening, end)
        found.append(measure(name, reference, logits, answers))
        print(_told(found[-1], tokens), flush=True)
    tasks = [task for task in TASKS for _ in range(per_task)]
    first = found[2] if checkpoints else found[1]
    _print_ratios(found[1:], first, tokens)
    _print_tasks(found, first, tokens, tasks)
    if out is not None:
        _write(out, found, first, tokens, tasks, {"seed": seed, "per_task": per_task, "device": device})


def _told(found: Measured, tokens: Sequence[int]) -> str:
    spread = summarize(found.sums, tokens)
    means = f"{_small(spread.mean)}   trimmed {_small(spread.trimmed)}   geometric {spread.geometric.value:.2e}"
    return f"{means}   {sum(found.changed):5d} changed   {sum(found.right) / len(tokens):6.1%} right   {found.name}"


def _small(band: Band) -> str:
    return f"{band.value:.6f} [{band.low:.6f}, {band.high:.6f}]"


def _print_ratios(found: Sequence[Measured], first: Measured, tokens: Sequence[int]) -> None:
    """Print each candidate over the first, on the same answers."""
    print(f"\nover {first.name}, paired: means; without the worst 1% of either; geometric mean of answers' ratios")
    for each in found:
        if each is not first:
            ratios = compare_answers(first.sums, each.sums, tokens)
            print(f"{ratios.mean!s:20} {ratios.trimmed!s:20} {ratios.geometric!s:20} {each.name}")


def _print_tasks(found: Sequence[Measured], first: Measured, tokens: Sequence[int], tasks: Sequence[str]) -> None:
    """Print, task by task, the share of right answers and the geometric ratio to the first candidate."""
    print("\nright answers of each task, and over the first, geometric")
    for task, rows in by_group(tasks, range(len(tasks))).items():
        cells = []
        for each in found:
            right = sum(each.right[i] for i in rows) / len(rows)
            ratio = compare_answers(
                [first.sums[i] for i in rows], [each.sums[i] for i in rows], [tokens[i] for i in rows]
            )
            own = each is first or each.name == "fp16"
            cells.append(f"{right:6.1%}" + ("" if own else f" {ratio.geometric!s:18}"))
        print(f"{task:16} {'   '.join(cells)}")


def _write(
    out: Path,
    found: Sequence[Measured],
    first: Measured,
    tokens: Sequence[int],
    tasks: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """Write all of it as JSON."""
    patch_torchvision()
    import transformers

    versions = {"qvl": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    rows = by_group(tasks, range(len(tasks)))
    candidates = [
        {
            "name": each.name,
            "kl": summarize(each.sums, tokens).to_dict(),
            "over_first": compare_answers(first.sums, each.sums, tokens).to_dict(),
            "changed": sum(each.changed),
            "right": {task: sum(each.right[i] for i in where) for task, where in rows.items()},
            "answer_kl": [float(f"{kl / n:.4g}") for kl, n in zip(each.sums, tokens, strict=True)],
        }
        for each in found
        if each.name != "fp16"
    ]
    fp16 = {task: sum(found[0].right[i] for i in where) for task, where in rows.items()}
    told = {**settings, "versions": versions, "first": first.name, "right_fp16": fp16, "candidates": candidates}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
