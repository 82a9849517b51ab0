"""The layers shared out over devices, searched in this process or in one for each device, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.console import note
from toolkit.errors import ResourceError
from toolkit.quantize.events import Captured, Ended, Event, Failed, LayerDone, Note
from toolkit.quantize.worker import Share, in_process
from toolkit.quantize.worker import run as run_share

if TYPE_CHECKING:
    from toolkit.calibration.inputs import PreparedSample
    from toolkit.quantize.progress import RunProgress

__all__ = ["Outcome", "search_shares"]


@dataclass(frozen=True)
class Outcome:
    """What the shares said: their layers, in the order of the model, and their ends."""

    layers: list[LayerDone]
    ends: list[Ended]


def search_shares(
    shares: Sequence[Share],
    samples: Sequence[PreparedSample],
    spare: Path,
    progress: RunProgress,
    copying: Future[None],
) -> Outcome:
    """Search all shares, and wait until their layers are written.

    Args:
        shares: one a device.
        samples: model inputs.
        spare: a file through which processes are given them; gone afterwards.
        progress: is shown what happens.
        copying: what is written meanwhile; its trouble ends the search.

    Raises:
        QvlError: of the kind of what stopped a share.
    """
    listener = _Listener(progress, copying)
    progress.begin("vision tower", len(samples))
    if len(shares) == 1:
        run_share(shares[0], samples, listener.hear)
    else:
        _search_in_parallel(shares, samples, spare, listener)
    return Outcome(sorted(listener.layers, key=lambda layer: layer.layer), listener.ends)


class _Listener:
    """Shows what shares say, and keeps what is reported."""

    def __init__(self, progress: RunProgress, copying: Future[None]) -> None:
        self.progress = progress
        self.copying = copying
        self.layers: list[LayerDone] = []
        self.ends: list[Ended] = []

    def hear(self, event: Event, rank: int = 0) -> None:
        match event:
            case Captured(samples):
                if rank == 0:  # all run the same samples
                    self.progress.advance(samples)
            case Note(text):
                note(text)
            case LayerDone():
                if self.copying.done():
                    self.copying.result()  # a full disk, say: why search on?
                self.layers.append(event)
                self.progress.layer(
                    event.name or f"layer {event.layer}", event.error, event.seconds["total"], event.peak
                )
            case Ended():
                self.ends.append(event)
            case Failed(error):
                raise error


def _search_in_parallel(
    shares: Sequence[Share], samples: Sequence[PreparedSample], spare: Path, listener: _Listener
) -> None:
    """Run each share in a process of its own."""
    import multiprocessing
    import queue

    import torch

    torch.save([(p.inputs, p.tokens, p.vision_tokens) for p in samples], spare)
    context = multiprocessing.get_context("spawn")
    told: multiprocessing.Queue[tuple[int, Event]] = context.Queue()
    processes = [
        context.Process(target=in_process, args=(share, spare, rank, told), daemon=True)
        for rank, share in enumerate(shares)
    ]
    try:
        for process in processes:
            process.start()
        while len(listener.ends) < len(processes):
            try:
                rank, event = told.get(timeout=1)
            except queue.Empty:
                for share, process in zip(shares, processes, strict=True):
                    if process.exitcode:
                        raise ResourceError(
                            f"the process on {share.device} died with exit code {process.exitcode}: killed "
                            "for want of host memory, perhaps"
                        ) from None
                continue
            listener.hear(event, rank)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
        spare.unlink(missing_ok=True)
