"""How much of the embedded model is left: divergence from fp16 and right answers, on held-out chats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from bench.studies.quantizer.errors import awq_layer, decoder_layers, layer_errors, load_model, rounded_layer
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.demo.evaluate import EVALUATION_SEED, Reader
from toolkit.demo.fidelity import answer_logits, divergence, held_out_chats
from toolkit.demo.quiz import is_right
from toolkit.paths import demo_checkpoint
from toolkit.tasks.questions import TASKS, question

__all__ = ["Examiner"]

#: Questions answered at a time, and new tokens at most (the longest answers, lists, have 35).
_BATCH, _NEW_TOKENS = 200, 40
#: Chats a task that the layers' errors are measured on.
_ERROR_CHATS = 5


class Examiner:
    """Measures quantized versions of the embedded model, in float32 on ``device``, against its fp16 source.

    Right answers come from greedy generation with transformers, ``per_task`` questions of each task; divergence is
    the mean over answer tokens of KL(fp16 || candidate) in nats, on ``chats_per_task`` chats of each task.
    """

    def __init__(self, per_task: int, chats_per_task: int, device: torch.device) -> None:
        self.model = load_model(demo_checkpoint(), device)
        reader = Reader(demo_checkpoint(), device.type)
        self._processor = reader.processor
        asked = [question(task, "held-out", EVALUATION_SEED, i) for task in TASKS for i in range(per_task)]
        self._batches = [asked[i : i + _BATCH] for i in range(0, len(asked), _BATCH)]
        self._inputs = [reader.inputs(batch) for batch in self._batches]
        self._per_task = per_task
        chats = held_out_chats(reader.processor, chats_per_task)
        self._chats = [
            replace(chat, inputs={name: value.to(device) for name, value in chat.inputs.items()}) for chat in chats
        ]
        few = min(_ERROR_CHATS, chats_per_task)
        self._error_chats = [self._chats[t * chats_per_task + i] for t in range(len(TASKS)) for i in range(few)]
        self._reference = self._logits()

    def source(self) -> dict[str, Any]:
        """Return the right answers of the fp16 model, as :meth:`examine` does, and how much was asked."""
        return {
            "right": self._right(),
            "questions": self._per_task,
            "chats": len(self._chats),
            "answer_tokens": sum(len(logits) for logits in self._reference),
            "error_tokens": sum(chat.tokens for chat in self._error_chats),
        }

    def examine(self, candidate: Checkpoint | int) -> dict[str, Any]:
        """Measure an AWQ checkpoint of the model, or rounding to nearest with a group size.

        Returns:
            ``right``: 1 or 0 for each question, by task; ``kl``, and ``chat_kl`` of each chat, in nats a token;
            ``layer_errors``: see :mod:`bench.studies.quantizer.errors`.
        """
        errors = layer_errors(self.model, {"": candidate}, self._error_chats)[""]
        with self._standing_in(candidate):
            logits = self._logits()
            right = self._right()
        return {
            "right": right,
            "kl": divergence(self._reference, logits),
            "chat_kl": [float(f"{divergence([r], [c]):.4g}") for r, c in zip(self._reference, logits, strict=True)],
            "layer_errors": errors,
        }

    @contextlib.contextmanager
    def _standing_in(self, candidate: Checkpoint | int) -> Iterator[None]:
        """Put the candidate's decoder layers in the place of the model's own."""
        layers = decoder_layers(self.model)
        own = list(layers)
        try:
            for index, layer in enumerate(own):
                layers[index] = (
                    rounded_layer(layer, candidate)
                    if isinstance(candidate, int)
                    else awq_layer(layer, candidate, index)
                )
            yield
        finally:
            for index, layer in enumerate(own):
                layers[index] = layer

    def _logits(self) -> Sequence[torch.Tensor]:
        tokenizer = self._processor.tokenizer
        opening = tokenizer.encode("<|im_start|>assistant\n")
        return answer_logits(self.model, self._chats, opening, tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def _right(self) -> dict[str, list[int]]:
        right: dict[str, list[int]] = {}
        for images, inputs in zip(self._batches, self._inputs, strict=True):
            with torch.inference_mode():
                ids = self.model.generate(**inputs, max_new_tokens=_NEW_TOKENS, do_sample=False)
            answers = self._processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for image, answer in zip(images, answers, strict=True):
                right.setdefault(image.task, []).append(int(is_right(image, answer)))
        return right
