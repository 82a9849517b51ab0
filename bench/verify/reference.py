"""transformers' side: the prompt that a checkpoint's processor makes, and what the model answers to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bench.verify.samples import Asked
from toolkit.compat import patch_torchvision
from toolkit.formats.reference import load_reference

if TYPE_CHECKING:
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["Prompt", "Reference", "Tokens"]


@dataclass(frozen=True)
class Prompt:
    """A chat as model inputs."""

    #: Token ids, each image as many as it comes to.
    ids: list[int]
    #: Each image's patches, height and width.
    grids: list[tuple[int, int]]
    #: What the processor made: ``input_ids``, ``pixel_values`` and the like.
    inputs: dict[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Tokens:
    """What the model answers, greedily."""

    ids: list[int]
    #: How much likelier each token was than the next one, in nats.
    margins: list[float]


class Reference:
    """A checkpoint in float32, as transformers runs it."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        """Load model and processor. Raises CheckpointError for a directory that transformers can't load."""
        patch_torchvision()
        from transformers import AutoProcessor

        self.checkpoint = checkpoint
        self.device = device
        self.processor: Any = AutoProcessor.from_pretrained(checkpoint.path)
        self.model: Any = load_reference(checkpoint, torch.float32, device)
        #: Of generation_config.json; 1 where it says none.
        self.repetition_penalty = 1.0
        #: Tokens that end an answer.
        self.ends: list[int] = []
        self._read_generation()

    def _read_generation(self) -> None:
        file = self.checkpoint.path / "generation_config.json"
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = {}
        ends = found.get("eos_token_id", self.checkpoint.text_config.get("eos_token_id"))
        self.ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self.repetition_penalty = float(found.get("repetition_penalty") or 1.0)

    def prompt(self, asked: Asked) -> Prompt:
        """Return a chat as its processor and template make it."""
        text = self.processor.apply_chat_template(
            asked.turns, chat_template=self._template(), add_generation_prompt=True, tokenize=False
        )
        inputs = dict(self.processor(images=asked.images or None, text=[text], return_tensors="pt"))
        grids = [(int(h), int(w)) for _, h, w in inputs["image_grid_thw"].tolist()] if asked.images else []
        return Prompt(inputs["input_ids"][0].tolist(), grids, inputs)

    def _template(self) -> str | None:
        """Return the processor's template, or where it has none its tokenizer's, as vLLM does."""
        found = self.processor.chat_template or self.processor.tokenizer.chat_template
        return found.get("default") if isinstance(found, dict) else found

    def with_ids(self, prompt: Prompt, ids: list[int]) -> Prompt:
        """Return a prompt with other tokens around the same images."""
        image, video = (
            int(self.checkpoint.config.get(key, self.checkpoint.family.vision_tokens[key][1]))
            for key in ("image_token_id", "video_token_id")
        )
        row = torch.tensor([ids])
        kinds = (row == image).to(torch.int64) + 2 * (row == video).to(torch.int64)
        made = {"input_ids": row, "attention_mask": torch.ones_like(row), "mm_token_type_ids": kinds}
        return Prompt(ids, prompt.grids, {**prompt.inputs, **{key: made[key] for key in made if key in prompt.inputs}})

    @torch.no_grad()
    def answer(self, prompt: Prompt, tokens: int, repetition_penalty: float = 1.0) -> Tokens:
        """Return the model's greedy answer, ``tokens`` long at most, its end token included."""
        made = self.model.generate(
            **self._on_device(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=repetition_penalty,
            eos_token_id=self.ends or None,
            pad_token_id=(self.ends or [0])[0],
            output_scores=True,
            return_dict_in_generate=True,
        )
        ids = made.sequences[0, len(prompt.ids) :].tolist()
        margins = []
        for scores in made.scores:
            two = scores[0].float().topk(2).values
            margins.append(float(two[0] - two[1]))
        return Tokens(ids, margins)

    @torch.no_grad()
    def first(self, prompt: Prompt) -> torch.Tensor:
        """Return the log-probabilities of the first token, float32 [vocabulary], in the model's present precision."""
        logits = self.model(**self._on_device(prompt), use_cache=False).logits[0, -1]
        found: torch.Tensor = logits.float().log_softmax(-1).cpu()
        return found

    def rounded(self, dtype: torch.dtype) -> Reference:
        """Compute in ``dtype`` from now on; what it rounds off of the weights does not come back.

        Frequencies of rotary positions stay in float32, as they do where a model is loaded in 16 bits.
        """
        exact = {name: buffer for name, buffer in self.model.named_buffers() if name.endswith("inv_freq")}
        self.model = self.model.to(dtype)
        for name, buffer in exact.items():
            module, _, attribute = name.rpartition(".")
            setattr(self.model.get_submodule(module), attribute, buffer)
        return self

    def _on_device(self, prompt: Prompt) -> dict[str, Any]:
        moved = {name: value.to(self.device) for name, value in prompt.inputs.items()}
        if "pixel_values" in moved:
            moved["pixel_values"] = moved["pixel_values"].to(self.model.dtype)
        return moved
