"""One device's share of a quantization: the layers that it searches, each written as soon as it is done.

A layer follows from nothing but the source, so shares need nothing of each other: every device runs the cheap forward
pass through the layers before its own.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.checkpoint.left_out import Linear
from toolkit.errors import QvlError, ResourceError
from toolkit.quantize.journal import write_layer
from toolkit.quantize.progress import MemoryWatch
from toolkit.quantize.recipe import Recipe

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    import torch

    from toolkit.calibration.inputs import PreparedSample
    from toolkit.quantize.search.autoawq import LayerResult

__all__ = ["Share", "in_process", "run"]

Tell = Callable[[str, Any], None]


@dataclass(frozen=True)
class Share:
    """What one device is to do.

    ``source``: the fp16 checkpoint. ``left``: linears that stay in 16 bits. ``directory``: the journal's. ``device``:
    as torch names it. ``store_on_device``: where hidden states wait. ``wanted``: layers to search. ``balance``: of each
    layer, what a vision token counts. ``report``: compare ways of searching.
    """

    source: Path
    recipe: Recipe
    left: frozenset[Linear]
    directory: Path
    device: str
    store_on_device: bool
    wanted: tuple[int, ...]
    balance: tuple[float, ...] | None = None
    report: bool = False


def run(share: Share, samples: Sequence[PreparedSample], tell: Tell) -> None:
    """Search the share's layers.

    ``tell`` is called with "captured" (samples through the vision tower), "forward" (a layer passed through), "layer"
    (a dict: index, error, seconds, peak), "note" (text) and, last, "end" (a dict of seconds and peaks).

    Raises:
        ResourceError: memory that no back-off could save.
    """
    import torch

    from toolkit.quantize.search.autoawq import Qwen2VLAwqQuantizer
    from toolkit.quantize.stream import Qwen2VLAWQ, StreamedLayers, load_shell

    began = time.perf_counter()
    checkpoint = Checkpoint.open(share.source)
    device = torch.device(share.device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
        torch.backends.cuda.matmul.allow_tf32 = True
    stream = torch.cuda.Stream(device) if cuda else None
    writing: list[Future[None]] = []
    done = 0
    embedded = 0.0

    def on_capture(count: int) -> None:
        nonlocal embedded
        embedded = time.perf_counter() - began
        tell("captured", count)

    def on_layer(result: LayerResult) -> None:
        nonlocal done
        packing = time.perf_counter()
        tensors = _tensors(checkpoint, share, result)
        if writing:
            writing.pop().result()  # one layer waits to be written at most
        record = {"layer": result.index, "relative_error": result.error, "choices": result.found.choices}
        if result.errors:
            record["errors"] = result.errors
        if cuda:
            torch.cuda.current_stream(device).synchronize()  # packed: the writer copies beside the next layer's search
        writing.append(writer.submit(_write, share.directory, result.index, tensors, record, stream))
        result.seconds["write"] = time.perf_counter() - packing
        result.seconds["total"] += result.seconds["write"]
        done += 1
        tell(
            "layer",
            {
                "layer": result.index,
                "error": result.error,
                "seconds": {k: round(v, 4) for k, v in result.seconds.items()},
                "peak": torch.cuda.max_memory_allocated(device) if cuda else memory.peak,
            },
        )

    left: dict[int, frozenset[str]] = {}
    for index in share.wanted:
        left[index] = frozenset(name for i, name in share.left if i == index)
    try:
        with MemoryWatch() as memory, ThreadPoolExecutor(1) as writer:
            shell, text_config = load_shell(checkpoint, device)
            awq = Qwen2VLAWQ(shell, "qwen2_vl", False, shell.config, None, None)
            del shell
            awq.quantize(
                quant_config={
                    "zero_point": True,
                    "q_group_size": share.recipe.group_size,
                    "w_bit": share.recipe.bits,
                    "version": share.recipe.format.upper(),
                },
                duo_scaling=share.recipe.scaling == "duo",
                apply_clip=share.recipe.clip,
                quantizer_cls=Qwen2VLAwqQuantizer,
                samples=samples,
                layers=StreamedLayers(checkpoint, text_config, device),
                device=device,
                store=device if share.store_on_device else torch.device("cpu"),
                norm_dtype=checkpoint.get(f"{checkpoint.layer_prefix(0)}input_layernorm.weight").dtype,
                on_layer=on_layer,
                on_note=lambda text: tell("note", text),
                on_capture=on_capture,
                on_forward=lambda index: tell("forward", index),
                search=share.recipe.search,
                rounding=share.recipe.rounding,
                wanted=share.wanted,
                skip=lambda index: left[index],
                balance=share.balance,
                report=share.report,
            )
            for last in writing:
                last.result()
    except torch.OutOfMemoryError as error:
        less = ", use --rounding nearest, which needs less," if share.recipe.rounding == "compensated" else ""
        raise ResourceError(
            f"out of memory on {device} after {done} layers, where fewer tokens at a time are no help: free memory "
            f"there{less} or choose a larger device (`qvl quantize --dry-run` says what is needed)"
        ) from error
    total = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    seconds = {"embed": round(embedded, 3), "layers": round(total - embedded, 3)}
    told = {"device": name, "seconds": seconds, "peak_device_bytes": peak, "peak_host_bytes": memory.peak}
    tell("end", told)


def _tensors(checkpoint: Checkpoint, share: Share, result: LayerResult) -> dict[str, torch.Tensor]:
    """Return a finished layer as the file holds it, by full names."""
    from toolkit.formats.packing import pack_gemm, pack_gemv

    pack = pack_gemm if share.recipe.format == "gemm" else pack_gemv
    prefix = checkpoint.layer_prefix(result.index)
    tensors = {}
    for name in checkpoint.family.linears:
        if name not in result.found.linears:
            tensors[f"{prefix}{name}.weight"] = checkpoint.get(f"{prefix}{name}.weight")
            continue
        packed = pack(result.found.linears[name])
        for part in ("qweight", "qzeros", "scales"):
            tensors[f"{prefix}{name}.{part}"] = getattr(packed, part)
    for name, tensor in result.found.others.items():
        tensors[prefix + name] = tensor.to(checkpoint.get(prefix + name).dtype)
    return tensors


def _write(
    directory: Path,
    index: int,
    tensors: dict[str, torch.Tensor],
    record: dict[str, Any],
    stream: torch.cuda.Stream | None,
) -> None:
    """Bring a layer to the CPU, on a stream of its own, and write it."""
    import torch

    with torch.cuda.stream(stream):
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_layer(directory, index, on_cpu, record)


def in_process(share: Share, samples: Path, rank: int, queue: Queue[tuple[int, str, Any]]) -> None:
    """Run a share in a process of its own; ``samples`` is a file of model inputs. Everything told goes to ``queue``."""
    from toolkit.compat import patch_torchvision

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends all shares
    patch_torchvision()
    import torch

    from toolkit.calibration.inputs import PreparedSample

    parent = os.getppid()

    def tell(kind: str, what: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)  # nobody waits for this share any more: give the device back
        queue.put((rank, kind, what))

    try:
        stored = torch.load(samples, mmap=True, weights_only=True)
        run(share, [PreparedSample(inputs, tokens, vision, "") for inputs, tokens, vision in stored], tell)
    except QvlError as error:
        tell("error", error)
    except BaseException as error:
        tell("error", ResourceError(f"the process on {share.device} failed: {type(error).__name__}: {error}"))
        raise
