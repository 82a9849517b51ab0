"""One device's share of a quantization: the layers that it searches, each written as soon as it is done.

A layer follows from nothing but the source, so shares need nothing of each other: every device runs the cheap forward
pass through the layers before its own.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.left_out import Linear
from toolkit.checkpoint.values import in_16_bits
from toolkit.errors import QvlError, ResourceError
from toolkit.quantize.devices import made_ready
from toolkit.quantize.events import Captured, Ended, Event, Failed, LayerDone, Note
from toolkit.quantize.head import HEAD, head_number, quantize_head
from toolkit.quantize.parts import Parts
from toolkit.quantize.progress import MemoryWatch
from toolkit.quantize.recipe import Recipe
from toolkit.quantize.tower import TowerWork, stage_name

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    import torch

    from toolkit.calibration.inputs import PreparedSample
    from toolkit.quantize.layer import LayerQuantizer, LayerResult
    from toolkit.quantize.search.strategy import SearchSettings, Strategy
    from toolkit.quantize.stream.layers import StreamedLayers
    from toolkit.quantize.stream.paired import PairedStream
    from toolkit.quantize.stream.passing import LayerStream

__all__ = ["Share", "Tell", "in_process", "run"]

Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Share:
    """What one device is to do.

    ``source``: the fp16 checkpoint. ``left``: linears that stay in 16 bits. ``directory``: the journal's. ``device``:
    as torch names it. ``store_on_device``: where hidden states wait. ``wanted``: layers to search. ``balance``: of each
    layer, what a vision token counts. ``report``: compare ways of searching. ``threads``: of torch on the CPU, in a
    process of its own; None: as many as it takes by itself.
    """

    source: Path
    recipe: Recipe
    left: frozenset[Linear]
    directory: Path
    device: str
    store_on_device: bool
    wanted: tuple[int, ...]
    balance: Sequence[float] | None = None
    report: bool = False
    threads: int | None = None


def run(share: Share, samples: Sequence[PreparedSample], tell: Tell) -> None:
    """Search the share's layers.

    Args:
        share: what to do.
        samples: model inputs.
        tell: called with events; `Ended` is the last.

    Raises:
        ResourceError: memory that no back-off could save.
    """
    import torch

    from toolkit.quantize.layer_writer import LayerWriter

    began = time.perf_counter()
    embedded = 0.0
    checkpoint = Checkpoint.open(share.source)
    device = made_ready(share.device)
    cuda = device.type == "cuda"
    writer = LayerWriter(checkpoint, share.recipe.format, share.directory, device)

    def peak() -> int:
        return torch.cuda.max_memory_allocated(device) if cuda else memory.peak

    def finished(result: LayerResult) -> None:
        writer.add(result)
        seconds = {step: round(took, 4) for step, took in result.seconds.items()}
        tell(LayerDone(result.index, result.error, seconds, peak()))

    try:
        with MemoryWatch() as memory, writer:
            _search_tower(checkpoint, share, samples, device, tell)
            head = head_number(checkpoint, share.recipe)
            if any(index < checkpoint.num_layers or index == head for index in share.wanted):
                stream, layers = _captured(checkpoint, share, samples, device, tell)
                embedded = time.perf_counter() - began
                paired = _search(checkpoint, share, stream, layers, finished)
                writer.wait()
                if head in share.wanted:
                    tell(_search_head(checkpoint, share, stream, paired, peak))
            writer.wait()
    except torch.OutOfMemoryError as error:
        less = ", use --rounding nearest, which needs less," if share.recipe.rounding == "compensated" else ""
        if share.recipe.effort == "best":
            less = ", use --effort fast, which needs less,"
        raise ResourceError(
            f"out of memory on {device} after {writer.done} layers, where fewer tokens at a time are no help: free "
            f"memory there{less} or choose a larger device (`qvl quantize --dry-run` says what is needed)"
        ) from error
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    seconds = {"embed": round(embedded, 3), "layers": round(time.perf_counter() - began - embedded, 3)}
    tell(Ended(name, seconds, peak() if cuda else 0, memory.peak))


def _search_tower(
    checkpoint: Checkpoint, share: Share, samples: Sequence[PreparedSample], device: torch.device, tell: Tell
) -> None:
    """Search the vision tower's stages among the share's, which are gone from memory afterwards."""
    import torch

    layers, head = checkpoint.num_layers, head_number(checkpoint, share.recipe)
    wanted = [index - layers for index in share.wanted if index >= layers and index != head]
    if not wanted:
        return

    def finished(index: int, error: float, seconds: dict[str, float]) -> None:
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else MemoryWatch.now()
        number = layers + index
        told = {step: round(took, 4) for step, took in seconds.items()}
        tell(LayerDone(number, error, told, peak, stage_name(checkpoint, number)))

    store = device if share.store_on_device else torch.device("cpu")
    work = TowerWork(checkpoint, share.recipe, share.directory, device)
    work.run(samples, wanted, store, lambda text: tell(Note(text)), finished)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _captured(
    checkpoint: Checkpoint, share: Share, samples: Sequence[PreparedSample], device: torch.device, tell: Tell
) -> tuple[LayerStream, StreamedLayers]:
    """Run the samples through all that comes before the decoder layers, which is let go of afterwards."""
    import torch

    from toolkit.quantize.search.gram import takes_bfloat16
    from toolkit.quantize.stream.layers import StreamedLayers
    from toolkit.quantize.stream.passing import LayerStream
    from toolkit.quantize.stream.shell import load_shell

    shell, text_config = load_shell(checkpoint, device)
    layers = StreamedLayers(checkpoint, text_config, device)
    stream = LayerStream(
        checkpoint.family.fused,
        layers.widths,
        device,
        device if share.store_on_device else torch.device("cpu"),
        narrow=takes_bfloat16(device),
        on_note=lambda text: tell(Note(text)),
    )
    stream.capture(shell, samples, lambda count: tell(Captured(count)))
    return stream, layers


def _search(
    checkpoint: Checkpoint,
    share: Share,
    stream: LayerStream,
    layers: StreamedLayers,
    finished: Callable[[LayerResult], None],
) -> PairedStream | None:
    """Search the wanted layers, one after the other, and pass the samples through those before and between.

    Where the head is wanted, they pass through all layers. Returns them on their second way, where there is one.
    """
    import torch

    from toolkit.quantize.layer import Clock
    from toolkit.quantize.replay import written_layer
    from toolkit.quantize.search.strategy import LayerTask

    paired = _paired(checkpoint, share, stream)
    quantizer = _quantizer(checkpoint, share, stream, paired)
    if stream.device.type == "cuda":
        torch.cuda.empty_cache()  # what the vision tower took
    try:
        with torch.no_grad():
            wanted = [index for index in share.wanted if index < checkpoint.num_layers]
            if head_number(checkpoint, share.recipe) in share.wanted:  # it stands behind all layers
                wanted.append(checkpoint.num_layers - 1)
            for index in range(max(wanted) + 1):
                clock = Clock(stream.device)
                layer = layers.load(index)
                clock("load")
                if index not in share.wanted:
                    stream.skip(layer)
                    if paired is not None:
                        file = Parts(share.directory).layer_file(index)
                        paired.advance(written_layer(layer, checkpoint, share.recipe, index, file))
                    continue
                skip = frozenset(name for i, name in share.left if i == index)
                result = quantizer.quantize(LayerTask(index, layer, stream.hold(layer), skip, clock))
                result.seconds = {**clock.seconds, "total": sum(clock.seconds.values())}
                finished(result)
    finally:
        layers.close()
    return paired


def _search_head(
    checkpoint: Checkpoint, share: Share, stream: LayerStream, paired: PairedStream | None, peak: Callable[[], int]
) -> LayerDone:
    """Search the output head, on samples that have passed through all layers."""
    from toolkit.quantize.layer import Clock

    number = head_number(checkpoint, share.recipe)
    assert number is not None
    clock = Clock(stream.device)
    settings = _settings(checkpoint, share.recipe)
    error = quantize_head(checkpoint, share.recipe, share.directory, stream, settings, paired)
    clock("search")
    return LayerDone(number, error, {**clock.seconds, "total": sum(clock.seconds.values())}, peak(), HEAD)


def _settings(checkpoint: Checkpoint, recipe: Recipe) -> SearchSettings:
    """Return what holds for all linears."""
    from toolkit.quantize.search.strategy import SearchSettings

    norm = in_16_bits(checkpoint.get(f"{checkpoint.layer_prefix(0)}{next(iter(checkpoint.family.norms))}.weight"))
    return SearchSettings(
        checkpoint.family,
        recipe.group_size,
        recipe.bits,
        norm.dtype,
        recipe.clip,
        recipe.rounding or "nearest",
        recipe.scaling != "none",
    )


def _paired(checkpoint: Checkpoint, share: Share, stream: LayerStream) -> PairedStream | None:
    """Return the samples on their second way, through quantized layers, where the recipe's effort asks for it."""
    from toolkit.quantize.search.chained import RESIDUAL, residuals_of
    from toolkit.quantize.stream.paired import PairedStream

    if share.recipe.effort != "best":
        return None
    return PairedStream(stream, residuals_of(checkpoint.family) if RESIDUAL else {})


def _quantizer(
    checkpoint: Checkpoint, share: Share, stream: LayerStream, paired: PairedStream | None
) -> LayerQuantizer:
    from toolkit.quantize.layer import LayerQuantizer

    recipe, settings = share.recipe, _settings(checkpoint, share.recipe)
    if paired is not None:
        from toolkit.quantize.search.chained import ChainedSearch

        def written(index: int, name: str, tensor: torch.Tensor) -> torch.Tensor:
            source = checkpoint.get(checkpoint.layer_prefix(index) + name)
            return in_16_bits(tensor.to(source.dtype)).float()

        best = ChainedSearch(paired, settings, written, share.balance)
        return LayerQuantizer(stream, checkpoint.family, {recipe.search: best}, recipe.search, report=False)
    names = ("rtn", "autoawq", "moments") if share.report else (recipe.search,)
    strategies = {name: _strategy(name, share, stream, settings) for name in names}
    return LayerQuantizer(stream, checkpoint.family, strategies, recipe.search, share.report)


def _strategy(name: str, share: Share, stream: LayerStream, settings: SearchSettings) -> Strategy:
    """Return a way of searching, by its name in a report; only AutoAWQ's own needs awq."""
    if name == "autoawq":
        from toolkit.quantize.search.autoawq import Qwen2VLAwqQuantizer

        return Qwen2VLAwqQuantizer(stream, settings, duo_scaling=share.recipe.scaling == "duo")
    if name == "moments":
        from toolkit.quantize.search.moments import MomentSearch

        return MomentSearch(stream, settings, share.balance)
    from toolkit.quantize.search.nearest import NearestRounding

    return NearestRounding(settings)


def in_process(share: Share, samples: Path, rank: int, queue: Queue[tuple[int, Event]]) -> None:
    """Run a share in a process of its own; ``samples`` is a file of model inputs. Everything told goes to ``queue``."""
    from toolkit.compat import patch_torchvision

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends all shares
    patch_torchvision()
    import torch

    from toolkit.calibration.inputs import PreparedSample

    if share.threads is not None:
        torch.set_num_threads(share.threads)
    parent = os.getppid()

    def tell(event: Event) -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody waits for this share any more: give the device back
        queue.put((rank, event))

    try:
        stored = torch.load(samples, mmap=True, weights_only=True)
        run(share, [PreparedSample(inputs, tokens, vision, "") for inputs, tokens, vision in stored], tell)
    except QvlError as error:
        tell(Failed(error))
    except BaseException as error:
        tell(Failed(ResourceError(f"the process on {share.device} failed: {type(error).__name__}: {error}")))
        raise
