"""The training loop: batches in, weights out, within a fixed stretch of wall time.

A step is hundreds of small kernels, so on a GPU launching them costs more than running them. Each shape of batch
is therefore captured into a CUDA graph once it has come up a few times, checked against the plain step, and replayed.
"""

from __future__ import annotations

import json
import math
import queue
import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from toolkit.console import note, warn
from toolkit.demo.feed import ASKED, TRAIN_TASKS, Feed, Shape
from toolkit.demo.model import TinyQwen2VL, normalize
from toolkit.demo.optim import Muon, split_parameters
from toolkit.demo.prompt import prefix
from toolkit.demo.quiz import Quiz, score
from toolkit.errors import QvlError
from toolkit.files import replacing

__all__ = ["Learner", "Rates", "TrainingFailed"]

#: Speed is told after so many steps: the first is slow, but on a CPU even a step takes seconds.
_SPEED_STEPS = 3


class TrainingFailed(QvlError):
    """The loss is no number any more, or no data came."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Learning rates: warm-up over steps, flat to a share of the time, then straight down to zero."""

    muon: float = 3e-3
    adamw: float = 1.5e-3
    warmup_steps: int = 300
    flat_share: float = 0.3

    def factor(self, step: int, progress: float) -> float:
        """Return what both rates are multiplied by; ``progress`` is the share of the time that is over."""
        down = 1.0 if progress < self.flat_share else max(0.0, (1 - progress) / (1 - self.flat_share))
        return min(1.0, (step + 1) / self.warmup_steps) * down


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A batch on the device."""

    shape: Shape
    pixels: Tensor
    ids: Tensor
    predicts: Tensor
    tasks: Tensor


@dataclass(slots=True)
class _Captured:
    """One shape's CUDA graph and the buffers it reads and writes."""

    graph: Any
    pixels: Tensor
    ids: Tensor
    predicts: Tensor
    loss: Tensor
    per_question: Tensor


@dataclass(slots=True)
class _Tally:
    """Sums of answers' losses by task since the last log line."""

    loss: Tensor
    count: Tensor

    def add(self, tasks: Tensor, per_question: Tensor) -> None:
        self.loss.index_add_(0, tasks, per_question)
        self.count.index_add_(0, tasks, torch.ones_like(per_question))

    def take(self) -> dict[str, float]:
        means = (self.loss / self.count.clamp(min=1)).tolist()
        seen = self.count.tolist()
        self.loss.zero_()
        self.count.zero_()
        return {task: round(mean, 4) for task, mean, n in zip(TRAIN_TASKS, means, seen, strict=True) if n}


class Step:
    """Forward and backward for one batch; gradients land in the parameters' ``.grad`` buffers."""

    #: A shape runs plainly this often before it is captured: kernels and tables are loaded by then.
    PLAIN_RUNS = 2

    def __init__(self, model: TinyQwen2VL, lock: threading.Lock, *, graphs: bool) -> None:
        self.model, self.lock, self.graphs = model, lock, graphs
        self.device = next(model.parameters()).device
        self.parameters = list(model.parameters())
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self._gradients = [p.grad for p in self.parameters if p.grad is not None]
        self._prefix = {seen: torch.tensor(prefix(seen), device=self.device) for seen in (True, False)}
        self._runs: dict[Shape, int] = {}
        self._captured: dict[Shape, _Captured] = {}
        self._pool: Any = None
        self.capture_seconds = 0.0

    @property
    def captured(self) -> int:
        """How many shapes run as CUDA graphs."""
        return len(self._captured)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda", cache_enabled=False)

    def _plain(self, pixels: Tensor, ids: Tensor, predicts: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return (loss, mean loss of each answer [B]) and write all gradients."""
        with self._autocast():
            image = self.model.encode(pixels) if shape.width else None
            logits = self.model(self._prefix[shape.width > 0], image, shape.grid, ids)
        targets = torch.roll(ids, -1, 1)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        losses = losses * predicts
        lengths = predicts.sum(1)
        # Between a mean over tokens (long lists drown short answers) and a mean over questions (the reverse).
        weights = predicts / lengths.sqrt()[:, None]
        loss = (losses * weights).sum() / weights.sum()
        gradients = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        torch._foreach_copy_(self._gradients, gradients)
        return loss.detach(), (losses.detach().sum(1) / lengths)

    def __call__(self, batch: OnDevice, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Run one batch with ``pixels`` normalized [B, H, W, 3]; returns (loss, each answer's mean loss)."""
        shape = batch.shape
        ready = self._captured.get(shape)
        if ready is None:
            runs = self._runs.get(shape, 0)
            self._runs[shape] = runs + 1
            result = self._plain(pixels, batch.ids, batch.predicts, shape)
            if not self.graphs or runs < self.PLAIN_RUNS:
                return result
            self._capture(batch, pixels, result[0])
            return result
        ready.pixels.copy_(pixels)
        ready.ids.copy_(batch.ids)
        ready.predicts.copy_(batch.predicts)
        ready.graph.replay()
        return ready.loss, ready.per_question

    def _capture(self, batch: OnDevice, pixels: Tensor, loss: Tensor) -> None:
        """Capture this shape, and keep the graph only if a replay gives the loss and gradients of the plain step."""
        started = time.monotonic()
        buffers = (pixels.clone(), batch.ids.clone(), batch.predicts.clone())
        expected, norm = float(loss), float(_norm(self._gradients))
        try:
            with self.lock:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    outputs = self._plain(*buffers, batch.shape)
                self._pool = graph.pool()
            graph.replay()
            got, got_norm = float(outputs[0]), float(_norm(self._gradients))
        except RuntimeError as error:
            self._give_up(f"capturing {batch.shape} failed: {error}")
            return
        if abs(got - expected) > 0.01 * expected + 1e-3 or abs(got_norm - norm) > 0.05 * norm + 1e-3:
            self._give_up(f"{batch.shape}: loss {expected:.5f} became {got:.5f}, gradient {norm:.5f} {got_norm:.5f}")
            self._plain(pixels, batch.ids, batch.predicts, batch.shape)
            return
        self._captured[batch.shape] = _Captured(graph, *buffers, *outputs)
        self.capture_seconds += time.monotonic() - started

    def _give_up(self, why: str) -> None:
        warn(f"CUDA graphs are off: {why}")
        self.graphs = False
        self._captured.clear()


def _norm(gradients: list[Tensor]) -> Tensor:
    norm: Tensor = torch.stack(torch._foreach_norm(gradients)).norm()
    return norm


@dataclass(slots=True)
class Supply:
    """A thread that moves batches to the device, and the recent ones to draw again when workers are slow."""

    feed: Feed
    device: torch.device
    keep: int
    lock: threading.Lock
    fresh: queue.Queue[OnDevice] = field(default_factory=lambda: queue.Queue(6))
    recent: list[OnDevice] = field(default_factory=list)
    rng: random.Random = field(default_factory=lambda: random.Random(5))
    drawn: int = 0
    reused: int = 0
    error: BaseException | None = None
    stopped: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Start moving batches."""
        threading.Thread(target=self._move, daemon=True).start()

    def _move(self) -> None:
        try:
            stream = torch.cuda.Stream() if self.device.type == "cuda" else None
            while not self.stopped.is_set():
                try:
                    batch = self.feed.get(timeout=1)
                except queue.Empty:
                    continue
                host = (batch.pixels, batch.packed.ids, batch.packed.predicts, batch.tasks)
                with self.lock, torch.cuda.stream(stream):
                    pixels, ids, predicts, tasks = (
                        torch.from_numpy(array).to(self.device, copy=True) for array in host
                    )
                    if stream is not None:
                        stream.synchronize()
                moved = OnDevice(batch.shape, pixels, ids, predicts, tasks)
                self.feed.release(batch)
                while not self.stopped.is_set():
                    try:
                        self.fresh.put(moved, timeout=1)
                        break
                    except queue.Full:
                        continue
        except BaseException as error:
            self.error = error

    def next(self) -> OnDevice:
        """Return a fresh batch, or, when none is ready and enough are kept, one of the recent ones again."""
        try:
            batch = self.fresh.get_nowait()
        except queue.Empty:
            if len(self.recent) >= self.keep // 4:
                self.reused += 1
                return self.rng.choice(self.recent)
            batch = self._wait()
        self.drawn += 1
        if self.device.type == "cuda":
            # Its memory belongs to the other thread's stream, which must not use it again before this one has read it.
            for tensor in (batch.pixels, batch.ids, batch.predicts, batch.tasks):
                tensor.record_stream(torch.cuda.current_stream())
        self.recent.append(batch)
        if len(self.recent) > self.keep:
            self.recent.pop(0)
        return batch

    def _wait(self) -> OnDevice:
        for _ in range(60):
            if self.error is not None:
                raise TrainingFailed("the thread that feeds the device failed") from self.error
            try:
                return self.fresh.get(timeout=1)
            except queue.Empty:
                continue
        raise TrainingFailed("no training data within 60 seconds")


class Learner:
    """Trains a fresh model until a deadline, saving and testing it on the way."""

    def __init__(self, feed: Feed, out: Path, device: str, seed: int) -> None:
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # It plans each new shape for long; flash attention does not.
        self.feed, self.out, self.device, self.rates = feed, out, torch.device(device), Rates()
        self.model = TinyQwen2VL().to(self.device)
        matrices, self.rest = split_parameters(self.model)
        on_gpu = self.device.type == "cuda"
        lock = threading.Lock()
        self.step = Step(self.model, lock, graphs=on_gpu)
        self.muon = Muon(matrices)
        self.adamw = torch.optim.AdamW(
            self.rest, lr=self.rates.adamw, betas=(0.9, 0.98), weight_decay=0.0, fused=on_gpu
        )
        self.supply = Supply(feed, self.device, 240 if on_gpu else 8, lock)
        self.noise = random.Random(seed)
        self.curve: list[dict[str, Any]] = []
        self.tests: list[dict[str, Any]] = []
        self.steps = self.samples = 0
        #: Called once, after a few steps, with samples a second.
        self.on_speed: Callable[[float], None] | None = None

    def train(
        self,
        clock: Callable[[], float],
        end: float,
        quiz: Quiz,
        *,
        max_steps: int | None,
        log_every: int,
        test_every: float,
    ) -> None:
        """Train until ``clock()`` (seconds since the process started) says ``end``, or for ``max_steps``.

        Every ``test_every`` seconds the quiz is asked, tasks are weighed by their errors, and ``out`` gets the weights
        and the curve so far. Raises ``TrainingFailed``.
        """
        self.supply.start()
        try:
            self._loop(clock, end, quiz, max_steps, log_every, test_every)
        finally:
            self.supply.stopped.set()
        note(
            f"[{clock():.0f} s] {self.steps} steps, {self.samples} samples, {self.supply.reused} batches reused, "
            f"{self.step.captured} graphs ({self.step.capture_seconds:.1f} s)"
        )

    def _loop(
        self,
        clock: Callable[[], float],
        end: float,
        quiz: Quiz,
        max_steps: int | None,
        log_every: int,
        test_every: float,
    ) -> None:
        zeros = torch.zeros(len(TRAIN_TASKS), device=self.device)
        tally = _Tally(zeros, zeros.clone())
        smooth: Tensor | None = None
        begun: float | None = None
        tested = clock()
        while (now := clock()) < end and (max_steps is None or self.steps < max_steps):
            batch = self.supply.next()
            if begun is None:
                begun = now = clock()
                note(f"[{now:.0f} s] first batch")
            factor = self.rates.factor(self.steps, (now - begun) / max(end - begun, 1e-9))
            loss, per_question = self.step(batch, self._noisy(batch))
            self._update(factor)
            with torch.no_grad():
                tally.add(batch.tasks, per_question)
                smooth = loss.clone() if smooth is None else smooth.lerp(loss, 0.02)
            self.steps += 1
            self.samples += batch.shape.batch
            if self.steps == _SPEED_STEPS and self.on_speed is not None:
                self.on_speed(self.samples / max(clock() - begun, 1e-9))
            if self.steps % log_every == 0:
                self._log(clock(), begun, float(smooth), factor, tally)
            if clock() - tested > test_every and end - clock() > 15:
                self._test(clock, quiz)
                tested = clock()

    def _noisy(self, batch: OnDevice) -> Tensor:
        """Normalize the images; most batches get some noise, so that no pixel is to be trusted."""
        pixels = normalize(batch.pixels)
        if self.noise.random() < 0.7:
            pixels += torch.randn_like(pixels) * (self.noise.random() * 0.12)
        return pixels

    def _update(self, factor: float) -> None:
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.muon.step(self.rates.muon * factor)
        for group in self.adamw.param_groups:
            group["lr"] = self.rates.adamw * factor
        self.adamw.step()

    def _log(self, now: float, begun: float, loss: float, factor: float, tally: _Tally) -> None:
        row = {
            "seconds": round(now, 1),
            "step": self.steps,
            "loss": round(loss, 4),
            "samples_per_second": round(self.samples / max(now - begun, 1e-9)),
            "rate": round(factor, 3),
            "reused": self.supply.reused,
            "graphs": self.step.captured,
            "tasks": tally.take(),
        }
        self.curve.append(row)
        note(json.dumps(row))
        if not math.isfinite(loss):
            raise TrainingFailed(f"the loss is {loss} at step {self.steps}")

    def _test(self, clock: Callable[[], float], quiz: Quiz) -> None:
        started = clock()
        shares = score(self.model, quiz).accuracy()
        self.tests.append({"seconds": round(started, 1), "step": self.steps, "accuracy": shares})
        note(f"test {json.dumps(self.tests[-1])} ({clock() - started:.1f} s)")
        weights = {}
        for task, weight in ASKED.items():
            right = min(shares["words"], shares["unseen_words"]) if task == "words" else shares.get(task, 0.9)
            weights[task] = weight * (0.25 + 1.5 * (1 - right))
        self.feed.weigh(weights)
        self.save()

    def save(self) -> None:
        """Write the weights so far (fp16, hub names) and the curve into ``out``."""
        with replacing(self.out / "model.safetensors") as partial:
            save_file(self.model.half_state(), partial, metadata={"format": "pt"})
            partial.chmod(0o644)
        (self.out / "curve.json").write_text(json.dumps({"curve": self.curve, "tests": self.tests}), encoding="utf-8")
