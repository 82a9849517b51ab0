"""What to choose of a quantization, tried on the embedded model: calibration, the vision tower, layers in 16 bits.

Each choice is one quantization a seed, held against the default's of the same seed on the same held-out answers. What
was measured is kept in choices.json, so that a run that was stopped goes on. On one GPU all of it takes minutes.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.judge.verdict import compare as judge_pairs
from bench.judge.verdict import judge_tasks
from bench.studies.settings import ChoicesSettings
from toolkit.compat import patch_torchvision
from toolkit.console import note
from toolkit.errors import FormatError
from toolkit.fidelity.paired import by_group, compare
from toolkit.paths import demo_checkpoint
from toolkit.tables import markdown
from toolkit.tasks.manifests import write_calibration
from toolkit.tasks.questions import TASKS, text_question
from toolkit.version import __version__

if TYPE_CHECKING:
    import torch

__all__ = ["CHOICES", "run"]

#: Where a manifest is written, how many chats it is to have, and the seed of their draw.
Write = Callable[[Path, int, int], Path]


def _mixed(directory: Path, samples: int, seed: int) -> Path:
    return write_calibration(directory, samples=samples, seed=seed)


def _texts(directory: Path, samples: int, seed: int) -> Path:
    """Chats without an image, drawn as the default's are."""
    rows = []
    for index in range(samples):
        asked, answer = text_question(random.Random(f"train/{seed}/text/{index}"))
        rows.append({"messages": [_turn("user", asked), _turn("assistant", answer)]})
    return _rewritten(directory, rows)


def _images(directory: Path, samples: int, seed: int) -> Path:
    """Chats with an image alone."""
    rows = _rows(write_calibration(directory, samples=samples * 8 // 7 + 1, seed=seed))
    seen = [row for row in rows if isinstance(row["messages"][0]["content"], list)]
    return _rewritten(directory, seen[:samples])


def _questions(directory: Path, samples: int, seed: int) -> Path:
    """The default's chats without their answers."""
    rows = _rows(write_calibration(directory, samples=samples, seed=seed))
    return _rewritten(directory, [{"messages": row["messages"][:1]} for row in rows])


def _turn(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _rewritten(directory: Path, rows: Sequence[dict[str, Any]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "calib.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Choice:
    """One way of quantizing: a manifest, what the recipe has otherwise, how much more an answer's token counts.

    ``report``: leave in 16 bits what costs most by a report, ranked by "kl" or by "error". ``beside``: the choice that
    this one is held against.
    """

    said: str
    write: Write = _mixed
    samples: int = 128
    recipe: dict[str, Any] = field(default_factory=dict)
    answers_count: float = 1.0
    report: str | None = None
    beside: str = "default"


#: By name.
CHOICES = {
    "default": Choice("128 chats, one in eight without an image"),
    "chats-32": Choice("32 chats", samples=32),
    "chats-512": Choice("512 chats", samples=512),
    "texts": Choice("128 chats without images", write=_texts),
    "images": Choice("128 chats, all with an image", write=_images),
    "questions": Choice("128 chats without their answers", write=_questions),
    "small-images": Choice("128 chats, images of a quarter of the pixels", recipe={"max_pixels": 112 * 112}),
    "modality": Choice("--balance modality", recipe={"balance": "modality"}),
    "answers-4": Choice("a token of an answer counts as four", answers_count=4),
    "answers-16": Choice("a token of an answer counts as sixteen", answers_count=16),
    "vision-128": Choice("--vision awq, what groups of 128 divide of the tower", recipe={"vision": "awq"}),
    "groups-32": Choice("groups of 32", recipe={"group_size": 32}),
    "vision-32": Choice(
        "--vision awq, all of the tower, against groups of 32",
        recipe={"vision": "awq", "group_size": 32},
        beside="groups-32",
    ),
    "budget-kl": Choice("+10% size, units ranked by KL", report="kl", recipe={"budget": 0.1}),
    "budget-error": Choice("+10% size, units ranked by output error", report="error", recipe={"budget": 0.1}),
    "budget-5-kl": Choice("+5% size, units ranked by KL", report="kl", recipe={"budget": 0.05}),
    "lm-head": Choice("--lm-head", recipe={"lm_head": True}),
    "no-clip": Choice("--no-clip", recipe={"clip": False}),
    "no-scales": Choice("--scaling none", recipe={"scaling": "none"}),
    "autoawq": Choice("--search autoawq", recipe={"search": "autoawq"}),
    "groups-64": Choice("groups of 64", recipe={"group_size": 64}),
    "best": Choice("--effort best, 512 chats", samples=512, recipe={"effort": "best"}),
    "best-no-clip": Choice("--effort best --no-clip, 512 chats", samples=512, recipe={"effort": "best", "clip": False}),
    "best-64": Choice(
        "--effort best, groups of 64, 512 chats", samples=512, recipe={"effort": "best", "group_size": 64}
    ),
}


def run(settings: ChoicesSettings) -> dict[str, Any]:
    """Try all choices that are not measured yet; write what was found after each.

    Raises:
        FormatError: a choice is unknown.
    """
    names = list(CHOICES) if settings.only is None else settings.only.split(",")
    unknown = [name for name in names if name not in CHOICES]
    if unknown:
        raise FormatError(f"unknown choices {', '.join(unknown)}: choose among {', '.join(CHOICES)}")
    asked = {"per_task": settings.per_task, "held_out": settings.held_out}
    kept = settings.out / "choices.json"
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {"settings": asked, "sums": {}}
    if found["settings"] != asked:
        raise FormatError(f"{kept} was measured with {found['settings']}: choose another --out")
    found.setdefault("right", {})
    names = list(dict.fromkeys(part for name in names for part in ("default", CHOICES[name].beside, name)))
    examiner = _Examiner(settings)
    found |= {"tokens": examiner.tokens, "tasks": examiner.tasks, "versions": _versions(), "device": examiner.device}
    found["right"]["fp16"] = examiner.right
    for seed in settings.seeds.split(","):
        for name in names:
            key = f"{name}/{seed}"
            if key not in found["sums"]:
                found["sums"][key], found["right"][key] = examiner.examine(CHOICES[name], int(seed))
                note(f"{name}, seed {seed}: measured")
                _write(settings.out, found)
    return found


def _versions() -> dict[str, str]:
    patch_torchvision()
    import torch
    import transformers

    return {"qvl": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


class _Examiner:
    """Quantizes the embedded model in one way, and says how far its held-out answers drift."""

    def __init__(self, settings: ChoicesSettings) -> None:
        patch_torchvision()
        from transformers import AutoProcessor

        from toolkit.demo.fidelity import answer_logits, held_out_chats, load, measure
        from toolkit.fidelity.answers import answer_tokens
        from toolkit.fidelity.turns import Turns

        processor = AutoProcessor.from_pretrained(demo_checkpoint())
        self.settings = settings
        import torch

        cuda = torch.device(settings.device).type == "cuda"
        self.device = torch.cuda.get_device_name(settings.device) if cuda else settings.device
        seeds = [int(seed) for seed in settings.held_out.split(",")]
        self._chats = [chat for seed in seeds for chat in held_out_chats(processor, settings.per_task, seed)]
        turns = Turns.of(processor.tokenizer)
        self._turns = (turns.opening, turns.end)
        ids = [chat.inputs["input_ids"][0] for chat in self._chats]
        self._answers = [row[answer_tokens(row, turns)] for row in ids]
        self._reference = answer_logits(load(None).to(settings.device), self._chats, *self._turns)
        #: Which of fp16's answers are right.
        self.right = _digits(measure("fp16", self._reference, self._reference, self._answers).right)
        self._reports: dict[int, dict[str, Any]] = {}
        self.tokens = [len(row) for row in self._reference]
        self.tasks = [task for _ in seeds for task in TASKS for _ in range(settings.per_task)]

    def examine(self, choice: Choice, seed: int) -> tuple[list[float], str]:
        """Return KL(fp16 || quantized) of each answer over its tokens, nats, and which answers are right."""
        from toolkit.demo.fidelity import answer_logits, load, measure
        from toolkit.quantize import quantize

        with tempfile.TemporaryDirectory(prefix="qvl-calibration-") as directory:
            manifest = choice.write(Path(directory) / "chats", choice.samples, seed)
            settings: dict[str, Any] = {"calib": str(manifest), "samples": choice.samples, **choice.recipe}
            if choice.report is not None:
                settings["from_report"] = self._report(choice.report, seed, Path(directory), settings)
            with _answers_counting(choice.answers_count):
                if choice.answers_count != 1:
                    settings["balance"] = "modality"
                made = quantize("demo", Path(directory) / "awq", **settings, devices=self.device, verdict=False)
            logits = answer_logits(load(made).to(self.device), self._chats, *self._turns)
        found = measure("", self._reference, logits, self._answers)
        return [float(f"{kl:.5g}") for kl in found.sums], _digits(found.right)

    def _report(self, rank: str, seed: int, directory: Path, settings: dict[str, Any]) -> Path:
        """Return a report on the default of this seed, made once, that ranks units by "kl" or by "error"."""
        from toolkit.quantize import quantize

        if seed not in self._reports:
            file, plain = directory / "layers.json", {k: v for k, v in settings.items() if k != "budget"}
            quantize("demo", directory / "plain", **plain, devices=self.device, verdict=False, layers_report=file)
            self._reports[seed] = json.loads(file.read_text(encoding="utf-8"))
        report = json.loads(json.dumps(self._reports[seed]))
        if rank == "error":
            for layer in report["layers"]:
                for unit in layer["units"].values():
                    del unit["kl"]
        path = directory / f"by-{rank}.json"
        path.write_text(json.dumps(report), encoding="utf-8")
        return path


def _digits(right: Sequence[bool]) -> str:
    return "".join("01"[one] for one in right)


@contextlib.contextmanager
def _answers_counting(factor: float) -> Iterator[None]:
    """Have a token of an answer count so many times as much as another, in the block.

    The quantizer knows two kinds of tokens, an image's and others, and weighs the former by a measured ratio squared.
    Here an answer's tokens are the others, and the ratio is given.
    """
    if factor == 1:
        yield
        return
    import torch

    from toolkit.fidelity.answers import answer_tokens
    from toolkit.fidelity.turns import Turns
    from toolkit.quantize import run as quantize_run
    from toolkit.quantize.stream.passing import LayerStream, held_samples

    original, measured, drawn = LayerStream.capture, quantize_run._sensitivity, Turns.of
    turns: list[Turns] = []

    def of(tokenizer: Any) -> Turns:
        turns.append(drawn(tokenizer))
        return turns[-1]

    def capture(self: LayerStream, shell: Any, samples: Any, on_sample: Any = None) -> None:
        original(self, shell, samples, on_sample)
        held = held_samples([sample.tokens for sample in samples])
        rest = [sample for i, sample in enumerate(samples) if i not in held] or samples
        masks: list[torch.Tensor] = [answer_tokens(sample.inputs["input_ids"][0], turns[-1]) for sample in rest]
        self.calibration.vision = ~torch.cat(masks).to(self.device)

    try:
        LayerStream.capture = capture  # type: ignore[method-assign]
        Turns.of = of  # type: ignore[method-assign]
        quantize_run._sensitivity = lambda checkpoint, *_: [factor**-0.5] * checkpoint.num_layers
        yield
    finally:
        LayerStream.capture = original  # type: ignore[method-assign]
        Turns.of = drawn  # type: ignore[method-assign]
        quantize_run._sensitivity = measured


def _write(out: Path, found: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "choices.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    (out / "choices.md").write_text(_table(found), encoding="utf-8")


def _table(found: dict[str, Any]) -> str:
    """Return choices over what each is held against, all seeds' answers together; the tasks that move most, and those
    that the paired verdict calls worse than fp16, beside."""
    seeds = list(dict.fromkeys(key.partition("/")[2] for key in found["sums"]))
    rows = []
    for name, choice in CHOICES.items():
        keys = (f"{name}/{{}}", f"{choice.beside}/{{}}")
        there = [seed for seed in seeds if all(key.format(seed) in found["sums"] for key in keys)]
        if not there:
            continue
        before = [kl for seed in there for kl in found["sums"][f"{choice.beside}/{seed}"]]
        after = [kl for seed in there for kl in found["sums"][f"{name}/{seed}"]]
        tokens, tasks = found["tokens"] * len(there), found["tasks"] * len(there)
        ratios = compare(before, after, tokens)
        apart = {}
        for task, where in by_group(tasks, range(len(tasks))).items():
            parts = [[values[i] for i in where] for values in (before, after, tokens)]
            apart[task] = compare(parts[0], parts[1], [int(n) for n in parts[2]]).geometric.value
        best, worst = min(apart, key=lambda t: apart[t]), max(apart, key=lambda t: apart[t])
        ends = f"{best} {apart[best]:.2f}, {worst} {apart[worst]:.2f}"
        means = [str(band) for band in (ratios.mean, ratios.trimmed, ratios.geometric)]
        right = "".join(found["right"][f"{name}/{seed}"] for seed in there)
        share = f"{right.count('1') / len(right):.1%}"
        said = _verdicts(found["right"]["fp16"], right, tasks)
        plain = [choice.said, "1", "1", "1", "", share, said, str(len(there))]
        rows.append(plain if choice.beside == name else [choice.said, *means, ends, share, said, str(len(there))])
    asked = found["settings"]
    about = (
        "# Choices of a quantization, tried on the embedded model\n\n"
        f"`python -m bench.studies choices --per-task {asked['per_task']} --held-out {asked['held_out']}`; "
        f"{found['device']}, {', '.join(f'{name} {version}' for name, version in found['versions'].items())}.\n\n"
        f"KL(fp16 || quantized) on {len(found['tokens']):,} held-out answers, over the default's or what each is held "
        f"against; calibration seeds {', '.join(seeds)} together; paired 95% intervals.\n\n"
    )
    head = ("", "mean KL", "trimmed", "geometric", "tasks, best and worst", "right", "beside fp16", "seeds")
    fp16 = found["right"]["fp16"]
    return about + markdown(head, rows) + f"\nfp16 answers {fp16.count('1') / len(fp16):.1%} right.\n"


def _verdicts(before: str, after: str, tasks: Sequence[str]) -> str:
    """Return how many tasks are no worse than fp16 by the paired verdict (a margin of a point), and which are worse.

    ``after`` holds the same questions once for each calibration seed: one question's answers are a cluster.
    """
    n = len(before)
    compared = {
        task: judge_pairs(
            [float(before[i % n]) for i in where],
            [float(after[i]) for i in where],
            seed=0,
            clusters=[str(i % n) for i in where],
        )
        for task, where in by_group(tasks, range(len(tasks))).items()
    }
    said = {task: verdict.judgement for task, verdict in judge_tasks(compared).items()}
    worse = [task for task, judgement in said.items() if judgement == "worse"]
    told = f"no worse: {sum(judgement == 'no worse' for judgement in said.values())} of {len(said)} tasks"
    return f"{told}; worse: {', '.join(worse)}" if worse else told
