"""Ask a checkpoint held-out questions the way a user would: transformers' own model, processor and greedy generate."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.demo.pictures import TASKS, Picture, question

__all__ = ["EVALUATION_SEED", "evaluate"]

#: Held-out questions that neither steered nor ended training.
EVALUATION_SEED = 9001


def evaluate(
    model: Path,
    per_task: int = 200,
    seed: int = EVALUATION_SEED,
    device: str = "auto",
    batch: int = 50,
    tasks: Sequence[str] = TASKS,
) -> dict[str, Any]:
    """Return accuracy by task over ``per_task`` held-out questions each, with what it was measured with.

    Weights are the checkpoint's own; arithmetic is fp16 on a GPU and float32 on a CPU. Answers count as in
    ``quiz.is_right``.
    """
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    import torch
    import transformers
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from toolkit.demo.quiz import Score

    started = time.monotonic()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()
    result = Score()
    for part in _batches([question(task, "held-out", seed, i) for task in tasks for i in range(per_task)], batch):
        for picture, answer in zip(part, _answers(network, processor, part), strict=True):
            result.add(picture, answer)
    return {
        "accuracy": {task: round(right / asked, 4) for task, (right, asked) in result.right.items()},
        "questions": {task: asked for task, (_, asked) in result.right.items()},
        "wrong": result.wrong,
        "seed": seed,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.monotonic() - started, 1),
    }


def _batches(pictures: Sequence[Picture], size: int) -> Iterator[Sequence[Picture]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def _answers(network: Any, processor: Any, pictures: Sequence[Picture]) -> list[str]:
    import torch

    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": picture.question}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for picture in pictures
    ]
    inputs = processor(
        text=prompts, images=[picture.image for picture in pictures], padding=True, return_tensors="pt"
    ).to(network.device)
    with torch.inference_mode():
        ids = network.generate(**inputs, max_new_tokens=40, do_sample=False)
    texts: list[str] = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def main() -> None:
    """Run ``python -m toolkit.demo.evaluate --model DIR --out FILE``."""
    parser = argparse.ArgumentParser(description="Ask a demo checkpoint held-out questions through transformers.")
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--per-task", type=int, default=200, help="questions a task")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED, help="seed of the held-out questions")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    given = parser.parse_args()
    facts = evaluate(given.model, given.per_task, given.seed, given.device)
    given.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(facts["accuracy"]), f"{facts['seconds']} s")


if __name__ == "__main__":
    main()
