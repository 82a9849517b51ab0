"""All samples through one decoder layer after the other, in micro-batches that back off when memory is short."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.errors import ResourceError
from toolkit.quantize.stream.shell import embed
from toolkit.quantize.stream.sizes import CHUNK_TOKENS, HELD_SHARE, HELD_TOKENS
from toolkit.quantize.stream.states import Held, States

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample

__all__ = ["LayerStream", "Take", "held_samples"]

#: Below this many tokens at once the trouble is not the chunk.
_MIN_CHUNK_TOKENS = 64

#: Is given each unit's input [n, K], by the unit's name, and which tokens they are; it may overwrite them.
Take = Callable[[dict[str, torch.Tensor], slice], None]


class LayerStream:
    """The samples on their way through the decoder layers: those that are searched on, and a few that check the search.

    ``calibration`` and ``held`` are their states before the next layer, there once :meth:`capture` was called.
    ``chunk_tokens``: how many tokens go through a layer at once; halved when the device runs out of memory.
    """

    calibration: States
    held: States

    def __init__(
        self,
        units: Mapping[str, Sequence[str]],
        widths: tuple[int, int],
        device: torch.device,
        store: torch.device,
        *,
        narrow: bool = False,
        on_note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Args.

        units: linears of a layer that share an input, by the unit's name.
        widths: of the hidden states, and inside the MLP.
        device: where layers are. store: where hidden states wait (the device, or the CPU).
        narrow: let the samples that are searched on pass in bfloat16.
        on_note: told when memory backs off.
        """
        self.units = units
        self.widths = widths
        self.device = device
        self.store = store
        self.narrow = narrow
        self.on_note = on_note
        self.chunk_tokens = CHUNK_TOKENS

    @torch.no_grad()
    def capture(
        self, shell: Any, samples: Sequence[PreparedSample], on_sample: Callable[[int], None] | None = None
    ) -> None:
        """Run every sample up to the first decoder layer; set some apart.

        Args:
            shell: from :func:`toolkit.quantize.stream.shell.load_shell`.
            samples: model inputs. A single one has to do for the search and for its check.
            on_sample: called with the number of samples done.
        """
        states = embed(shell, samples, self.device, self.store, on_sample)
        held = held_samples([state.lengths[0] for state in states])
        self.held = States.join([states[i] for i in held])
        rest = [state for i, state in enumerate(states) if i not in held] or states
        self.calibration = States.join(rest)

    def advance(self, layer: nn.Module, take: Take | None = None) -> None:
        """Pass the samples that are searched on through a layer, to stand before the next.

        In bfloat16 where that was asked for, as the served model does, but for what is added up between layers.
        """
        self.pass_through(layer, self.calibration, take, narrow=self.narrow)
        self.calibration.add()

    def peek(self, layer: nn.Module, take: Take) -> None:
        """Show what a layer is given, in float32, and leave the samples where they are."""
        before = copy.copy(self.calibration)
        before.hidden = before.hidden.clone()
        self.pass_through(layer, before, take)

    def hold(self, layer: nn.Module) -> Held:
        """Run the held samples through a layer, in float32, keeping what it is given and what it makes of it.

        They stand before the next layer afterwards; the one that is returned has their states from before, and as its
        output the layer's own, without what a vision tower adds behind it.
        """
        inputs: dict[str, list[torch.Tensor]] = {unit: [] for unit in self.units}

        def take(seen: dict[str, torch.Tensor], _: slice) -> None:
            for unit, x in seen.items():
                inputs[unit].append(x.clone())

        before = copy.copy(self.held)
        before.hidden = self.held.hidden.clone()
        output = self.pass_through(layer, self.held, take)
        if self.held.added:
            output = output.clone()
            self.held.add()
        return Held(before, output, {unit: torch.cat(parts) for unit, parts in inputs.items()})

    def skip(self, layer: nn.Module) -> None:
        """Pass all samples through a layer that is not searched."""
        self.advance(layer)
        self.pass_through(layer, self.held)
        self.held.add()

    @torch.no_grad()
    def pass_through(
        self, layer: nn.Module, states: States, take: Take | None = None, *, narrow: bool = False
    ) -> torch.Tensor:
        """Run samples through a layer in micro-batches; ``states.hidden`` becomes, and is returned as, its output."""
        seen: dict[str, torch.Tensor] = {}
        first = 0
        with self._seeing(layer, seen if take is not None else None):
            while first < len(states.lengths):
                batch = states.batch(first, self.chunk_tokens)
                output = None
                with (
                    contextlib.suppress(torch.OutOfMemoryError),
                    torch.autocast("cuda", torch.bfloat16, enabled=narrow),
                ):
                    output = layer(**states.inputs(batch, self.device))
                if output is None:
                    seen.clear()
                    self.back_off(batch.stop - batch.start if len(batch.lengths) == 1 else None)
                    continue
                tokens = slice(batch.start, batch.stop)
                states.hidden[:, tokens] = output.to(states.hidden.device)
                del output
                if take is not None:
                    take(seen, tokens)
                    seen.clear()
                first += len(batch.lengths)
        return states.hidden

    @contextlib.contextmanager
    def _seeing(self, layer: nn.Module, seen: dict[str, torch.Tensor] | None) -> Iterator[None]:
        """Put each unit's input [n, K] into ``seen`` while the layer runs; None: nothing is looked at."""
        handles = []
        if seen is not None:
            for unit, names in self.units.items():

                def see(_: nn.Module, args: tuple[torch.Tensor, ...], unit: str = unit) -> None:
                    seen[unit] = args[0].flatten(0, -2)

                handles.append(layer.get_submodule(names[0]).register_forward_pre_hook(see))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def back_off(self, alone: int | None = None) -> None:
        """Halve the micro-batch, or say why that can't help: ``alone`` is the length of a sample on its own.

        To be called when the error is gone, for as long as it lives it holds on to what the failed pass allocated.

        Raises:
            ResourceError: the micro-batch is as small as it gets.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if alone is not None:
            raise ResourceError(
                f"out of memory on {self.device}: one sample of {alone} tokens does not fit. Leave such samples "
                f"out with --max-tokens {self._tokens_that_fit(alone)}, use smaller images with --max-pixels, "
                "or free memory"
            )
        if self.chunk_tokens // 2 < _MIN_CHUNK_TOKENS:
            raise ResourceError(
                f"out of memory on {self.device} even with {self.chunk_tokens} tokens at a time: "
                "free memory on the device, or choose a larger one (`qvl quantize --dry-run` says what is needed)"
            )
        self.chunk_tokens //= 2
        self.on_note(f"{self.device} is out of memory: going on with {self.chunk_tokens} tokens at a time")

    def make_room(self) -> bool:
        """Let the hidden states wait in host memory; returns False when they do already."""
        if self.calibration.hidden.device.type == "cpu":
            return False
        self.calibration.hidden = self.calibration.hidden.cpu()
        self.calibration.added = tuple(level.cpu() for level in self.calibration.added)
        torch.cuda.empty_cache()
        self.on_note(f"{self.device} is out of memory: from here on hidden states wait in host memory")
        return True

    def _tokens_that_fit(self, alone: int) -> int:
        """Guess how long a sample may be, from the memory that is free and the widest tensors that it needs."""
        if self.device.type != "cuda":
            return alone // 2
        free, _ = torch.cuda.mem_get_info(self.device)
        hidden, inner = self.widths
        return int(min(free // (4 * (4 * inner + 8 * hidden)), alone // 2))


def held_samples(lengths: Sequence[int]) -> frozenset[int]:
    """Choose the samples that check the search: spread over the whole, few against the rest, but one at least.

    One is half of two samples: a check on what the search has not seen is worth more than the tokens it costs.
    """
    budget = min(HELD_TOKENS, int(sum(lengths) * HELD_SHARE))
    count = max(1, round(budget * len(lengths) / sum(lengths)))
    return frozenset(i * len(lengths) // count for i in range(count))
