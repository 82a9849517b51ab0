"""Ask a checkpoint held-out questions the way a user would: transformers' own model, processor and greedy generate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.errors import CheckpointError, ManifestError
from toolkit.tasks.questions import TASKS, ImageQuestion, question

if TYPE_CHECKING:
    from transformers import BatchFeature

__all__ = ["EVALUATION_SEED", "Reader", "evaluate", "record_accuracy"]

#: Held-out questions that neither steered nor ended training.
EVALUATION_SEED = 9001
#: The longest answers, lists, have 35 ids.
_MAX_NEW_TOKENS = 40


class Reader:
    """A checkpoint in transformers: ``network`` in fp16 on a GPU, in float32 on a CPU; and its ``processor``.

    Raises ``CheckpointError`` when the directory is no checkpoint, or one of quantized weights.
    """

    def __init__(self, model: Path, device: str = "auto") -> None:
        from toolkit.checkpoint.checkpoint import Checkpoint
        from toolkit.compat import patch_torchvision

        patch_torchvision()
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if Checkpoint.open(model).quantization is not None:
            raise CheckpointError(f"{model} is quantized, which takes a server to run: qvl bench --candidate {model}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if device == "cuda" else torch.float32
        self.processor = AutoProcessor.from_pretrained(model)
        self.network = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype).to(device).eval()

    def inputs(self, items: Sequence[ImageQuestion]) -> BatchFeature:
        """Return the model's inputs for a batch of questions, padded on the left."""
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": item.question}]}]
            for item in items
        ]
        prompts = [
            self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
        ]
        images = [item.image for item in items]
        inputs = self.processor(text=prompts, images=images, padding=True, return_tensors="pt")
        return inputs.to(self.network.device)

    def ask(self, items: Sequence[ImageQuestion], batch: int = 50) -> list[str]:
        """Return the model's greedy answers, ``batch`` questions at a time."""
        import torch

        answers: list[str] = []
        for start in range(0, len(items), batch):
            inputs = self.inputs(items[start : start + batch])
            with torch.inference_mode():
                ids = self.network.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            answers += self.processor.batch_decode(new, skip_special_tokens=True)
        return answers


def evaluate(model: Path, per_task: int = 200, seed: int = EVALUATION_SEED, device: str = "auto") -> dict[str, Any]:
    """Return accuracy by task over ``per_task`` held-out questions each, with what it was measured with.

    Answers count as in ``quiz.is_right``. Raises as :class:`Reader`, and ``ManifestError`` when ``per_task`` < 1.
    """
    if per_task < 1:
        raise ManifestError(f"{per_task} questions a task: ask at least one")
    started = time.monotonic()
    reader = Reader(model, device)

    import torch
    import transformers

    from toolkit.demo.quiz import Score

    asked = [question(task, "held-out", seed, index) for task in TASKS for index in range(per_task)]
    result = Score()
    for item, answer in zip(asked, reader.ask(asked), strict=True):
        result.add(item, answer)
    on_gpu = reader.network.device.type == "cuda"
    return {
        "accuracy": result.accuracy(),
        "questions": {task: asked for task, (_, asked) in result.right.items()},
        "wrong": result.wrong,
        "seed": seed,
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "dtype": str(reader.network.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.monotonic() - started, 1),
    }


def record_accuracy(model: Path, per_task: int, device: str = "auto") -> dict[str, Any]:
    """Evaluate a trained demo checkpoint; write accuracy.json and, from it, README.md beside its weights."""
    from toolkit.demo.model_card import write_card
    from toolkit.demo.record import ACCURACY, write_record

    facts = evaluate(model, per_task, device=device)
    write_record(model / ACCURACY, facts)
    write_card(model)
    return facts
