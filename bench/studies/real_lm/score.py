"""Two models over the same tokens: the divergence of the one that is quantized, and how well each predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ManifestError
from toolkit.formats.linears import read_tensor
from toolkit.formats.packing import dequantize
from toolkit.quantize.search.grid import round_to_grid

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pair", "Score", "cut"]

#: Tokens of a sequence, of which the first are read only; sequences at a time.
_LENGTH, _CONTEXT, _BATCH = 512, 128, 8


@dataclass(frozen=True)
class Score:
    """What was measured on some sequences; ``kl`` and ``loss`` are means of each sequence, in nats a token.

    ``kl``: of the quantized model from its source. ``p99``: of the divergence over tokens. ``top1``: share of tokens
    whose likeliest token is the source's. ``loss``: what the text's own tokens cost; ``source_loss`` in the source.
    """

    kl: list[float]
    p99: float
    top1: float
    loss: list[float]
    source_loss: list[float]


def cut(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], count: int, seeds: int) -> list[torch.Tensor]:
    """Return the tokens [count, 512] of each of ``seeds`` draws, which have no text in common.

    Raises:
        ManifestError: too few texts are long enough.
    """
    rows = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:_LENGTH]
        if len(ids) == _LENGTH:
            rows.append(ids)
        if len(rows) == count * seeds:
            return [torch.tensor(rows[seed::seeds]) for seed in range(seeds)]
    raise ManifestError(f"{len(rows)} of {len(texts)} texts have {_LENGTH} tokens: {count * seeds} are needed")


class Pair:
    """A model's source, and the same model with other weights."""

    def __init__(self, source: Path, device: torch.device) -> None:
        """Args: the unquantized checkpoint, and where both are run; in bfloat16 on a GPU, float32 on a CPU."""
        self.checkpoint = Checkpoint.open(source)
        self.device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.source = _load(source, self._dtype, device)
        self.other = _load(source, self._dtype, device)

    def nearest(self, group_size: int) -> None:
        """Give the other model the source's weights, its decoder's linears rounded to nearest."""
        self._end(self.source.model.language_model.norm.weight, self.source.lm_head.weight)
        for layer, true in zip(_layers(self.other), _layers(self.source), strict=True):
            layer.load_state_dict(true.state_dict())  # norms and biases too, which another way may have changed
            for name in self.checkpoint.family.linears:
                weight = true.get_submodule(name).weight.float()
                rounded = dequantize(round_to_grid(weight, group_size), torch.float32)
                layer.get_submodule(name).weight.data.copy_(rounded)

    def take(self, path: Path) -> None:
        """Give the other model an AWQ checkpoint's decoder layers, final norm and output head."""
        found = Checkpoint.open(path)
        packed = found.is_packed("lm_head")
        head = read_tensor(found, "lm_head.weight", device=self.device) if packed else found.get(found.head_name)
        self._end(found.get(f"{found.language_prefix}norm.weight"), head)
        for index, layer in enumerate(_layers(self.other)):
            for name, tensor in _weights(found, index, self.device):
                layer.get_parameter(name).data.copy_(tensor)

    def _end(self, norm: torch.Tensor, head: torch.Tensor) -> None:
        """Give the other model a final norm and an output head, which is not its embeddings."""
        language, own = self.other.model.language_model, self.other.lm_head
        if own.weight is language.embed_tokens.weight:
            own.weight = torch.nn.Parameter(own.weight.detach().clone(), requires_grad=False)
        language.norm.weight.data.copy_(norm)
        own.weight.data.copy_(head)

    @torch.no_grad()
    def score(self, tokens: torch.Tensor) -> Score:
        """Measure the other model on sequences [n, 512]."""
        parts: list[tuple[torch.Tensor, ...]] = [self._score(batch.to(self.device)) for batch in tokens.split(_BATCH)]
        kl, same, loss, source_loss = (torch.cat(part) for part in zip(*parts, strict=True))
        return Score(
            kl.mean(1).tolist(),
            float(kl.flatten().quantile(0.99)),
            float(same.float().mean()),
            loss.mean(1).tolist(),
            source_loss.mean(1).tolist(),
        )

    def _score(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return divergence, agreement and both losses of each token [n, 384] but those of the context."""
        true, found = (self._log_probabilities(model, tokens) for model in (self.source, self.other))
        kl = (true.exp() * (true - found)).sum(-1)
        said = tokens[:, _CONTEXT + 1 :].unsqueeze(-1)
        losses = (-each.gather(-1, said).squeeze(-1) for each in (found, true))
        return tuple(part.cpu() for part in (kl, true.argmax(-1) == found.argmax(-1), *losses))

    def _log_probabilities(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits[:, _CONTEXT:-1].float().log_softmax(-1)


def _load(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    from toolkit.compat import patch_torchvision

    patch_torchvision()
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, device_map={"": str(device)})
    return model.requires_grad_(False).eval()


def _layers(model: Any) -> Any:
    return model.model.language_model.layers


def _weights(checkpoint: Checkpoint, index: int, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a decoder layer's tensors by local name, dequantized in float32."""
    prefix, info = checkpoint.layer_prefix(index), checkpoint.quantization
    for name in checkpoint.tensors:
        module, _, part = name.rpartition(".")
        if not name.startswith(prefix):
            continue
        if info is None or part == "bias" or not checkpoint.is_packed(module):
            yield name.removeprefix(prefix), checkpoint.get(name).to(device)
        elif part == info.layout.qweight:
            weight = f"{module}.weight"
            yield weight.removeprefix(prefix), read_tensor(checkpoint, weight, device=device)
