"""The phase that loads the systems: warm-up, then every load in each round, the two in turns."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import psutil

from bench.load import metrics
from bench.load.client import Failure, Trace, ask_again
from bench.load.inputs import Inputs, Made
from bench.load.loops import Block, Send, closed_loop, open_loop, replay, schedule
from bench.load.sweep import Point, SweepPlan, sweep
from bench.load.traffic import Traffic, TrafficInputs
from bench.machine import energy, server_metrics
from bench.machine.server_metrics import ServerPoint
from bench.roles import Role
from bench.run.config import BenchConfig
from bench.run.loads import SWEEP, WAVES, Load
from bench.run.measured import Stretch
from bench.run.running import Running
from bench.run.systems import System
from toolkit.errors import BenchError
from toolkit.models.image_rule import RULES, ImageRule, rule_of

__all__ = ["FAILED_SHARE", "IN_FLIGHT", "measure_speed"]

#: Under a duration, so many times the requests are made that the fastest pace seen before asks for.
SPARE = 3.0
#: Most requests in flight under a rate, and most that wait beyond that before the server counts as too slow for it.
IN_FLIGHT = 1024
#: When a larger share of a point's requests fails, over all its rounds, it ends.
FAILED_SHARE = 0.05
#: A server is warm when a pass over all shapes takes more than this share of the fastest pass before; after so many
#: passes it is taken as it is.
FASTER, PASSES = 0.95, 6
#: Requests with images that are sent without them too, to see how many tokens images become.
TWINS = 4


@dataclass(frozen=True, slots=True)
class _Request:
    """One request of a block: which it is, its shape (empty where all have the same), what is sent, the length of its
    answer, the sizes of its images, and whether it is a later turn of the chat before it."""

    number: int
    shape: str
    body: bytes
    asked: int
    sizes: tuple[tuple[int, int], ...] = ()
    follows: bool = False


def _follows(request: _Request) -> bool:
    return request.follows


async def measure_speed(run: Running) -> None:
    """Measure every unit that is missing, a round at a time, after a warm-up."""
    await _Speed(run).measure()


class _Speed:
    """What is known of the systems' speed while it is measured."""

    def __init__(self, run: Running) -> None:
        self.run, self.config = run, run.config
        #: Seconds that the fastest request took of a system at a concurrency.
        self._pace: dict[tuple[Role, int], float] = {}
        #: The rate that was too much for a system.
        self._ceiling: dict[Role, float] = {}
        #: Whether a server sends several tokens in a chunk, and whether it counts them there when asked to.
        self._packed = False
        self._counts = False
        self._meters: dict[Role, energy.Meter | None] = {}
        #: The first pass of the warm-up.
        self._first: dict[Role, Block] = {}
        #: How many tokens an image becomes, where what a server counts agrees with it.
        self._rules: dict[Role, ImageRule] = {}

    def _inputs(self, system: System, stretch: Traffic | None = None) -> Inputs:
        """Both systems get the same inputs, unless both are one server, whose caches would know them the second time.

        Args:
            stretch: what is replayed, from its beginning.
        """
        shared = len({other.endpoint.url for other in self.run.systems}) < len(self.run.systems)
        nonce = f"{self.config.nonce}/{system.role}" if shared else self.config.nonce
        traffic = stretch or self.run.traffic
        if traffic is None:
            return self.config.inputs(nonce)
        return TrafficInputs(nonce, traffic, self.config.output_tokens, whole=stretch is not None)

    def _requests(self, system: System, found: Sequence[Made]) -> list[_Request]:
        mixed = len({made.shape for made in found}) > 1
        model = system.endpoint.model
        return [
            _Request(
                number,
                made.shape if mixed else "",
                made.request.body(model, count_chunks=self._counts),
                made.request.max_tokens,
                made.sizes,
                made.follows,
            )
            for number, made in enumerate(found)
        ]

    def _sender(self, system: System) -> Send[_Request]:
        client = self.run.clients[system.role]

        async def send(request: _Request, due: float) -> Trace:
            trace = await ask_again(client, request.body, timeout_s=self.config.timeout_s, scheduled=due)
            if trace.failure is None and not trace.chunks:
                empty = Failure(
                    "empty", "the answer has no text although a fixed length was asked for: nothing to time"
                )
                trace = Trace(trace.scheduled, trace.started, trace.ended, failure=empty)
            rule = self._rules.get(system.role)
            return replace(
                trace,
                number=request.number,
                shape=request.shape,
                asked=request.asked,
                images=len(request.sizes),
                image_tokens=sum(rule.tokens(*size) for size in request.sizes) if rule else None,
            )

        return send

    async def measure(self) -> None:
        """Measure every unit that is missing, a round at a time, after a warm-up."""
        config = self.config
        missing = [
            (round_, step, unit, system)
            for round_ in range(config.rounds)
            for step, unit in enumerate(config.units)
            for system in self.run.turns(round_ + step)
            if (system.role, unit, round_) not in self.run.found.units
        ]
        if not missing:
            return
        await self._warm_up({unit for _, _, unit, _ in missing})
        if self.run.found.failures:
            return
        loads = {load.name: load for load in config.loads}
        self.run.live.begin("load", sum(self._expected(system.role, loads.get(unit)) for _, _, unit, system in missing))
        for round_, _, unit, system in missing:
            self.run.live.doing(f"{system.role}, {unit}, round {round_ + 1} of {config.rounds}")
            load = loads.get(unit)
            if load is None:
                stretches = await self._sweep(system, round_)
            elif load.concurrency is not None:
                stretches = [(load, await self._closed(system, load, round_))]
            elif load.speed is not None:
                stretches = [(load, await self._replay(system, load, round_))]
            elif load.rate_per_s is not None and load.rate_per_s < self._ceiling.get(system.role, math.inf):
                stretches = [(load, await self._open(system, load, round_))]
            else:
                stretches = []  # a lower rate was too much already
            if self.run.found.failures:
                return
            self.run.found.units[system.role, unit, round_] = stretches
            self.run.keep.unit(system.role, unit, round_, stretches)

    async def _warm_up(self, units: set[str]) -> None:
        """Show each server every shape of request one by one, at least twice and until it gets no faster, then a wave
        at each concurrency that is measured; no input of these is measured later."""
        config = self.config
        shapes = len(self._inputs(self.run.systems[0]).warm_up())
        waves = {c for c in config.concurrencies if Load.in_flight(c).name in units}
        waves |= {config.sweep_concurrency} if SWEEP in units else set()
        self.run.live.begin(
            "warm-up", (2 * shapes + sum(max(wave, shapes) for wave in waves if wave > 1)) * len(self.run.systems)
        )
        await self._until_settled()
        for system in self.run.systems:
            if self.run.found.failures:
                return
            self.run.live.doing(system.role)
            inputs = self._inputs(system)
            await self._count_images(system, inputs)
            # As many as the highest rate will have in flight, by Little's law.
            busy = math.ceil(max(config.rates, default=0.0) * self._pace[system.role, 1])
            for wave in sorted({*waves, min(busy, IN_FLIGHT)} - {0, 1}):
                shown = inputs.warm_up(f"warm-up/wave/{wave}")
                shown += inputs.made(f"warm-up/{wave}", max(0, wave - len(shown)))
                await self._wave(system, wave, shown)
                if self.run.found.failures:
                    return
        if self._packed:
            self._counts = all([await self._counts_chunks(system) for system in self.run.systems])

    async def _until_settled(self) -> None:
        """Show both servers every shape one by one, again and again, until no pass is faster than the best before."""
        best: dict[Role, float] = {}
        for turn in range(PASSES):
            faster = []
            for system in self.run.systems:
                self.run.live.doing(system.role)
                block = await self._wave(system, 1, self._inputs(system).warm_up(f"warm-up/{turn}"))
                if self.run.found.failures:
                    return
                self._packed |= any(metrics.tokens_per_chunk(trace) > 1 for trace in block.traces)
                now, before = median(map(metrics.e2e, block.traces)), best.get(system.role, math.inf)
                faster += [system.role] if now < FASTER * before else []
                best[system.role] = min(now, before)
                if not turn:
                    self._first[system.role] = block
            if turn and not faster:
                return
        self.run.found.notes.append(
            f"the servers still got faster at the end of {PASSES} passes of warm-up ({', '.join(faster)}): first "
            "rounds may be slower than they are"
        )

    async def _count_images(self, system: System, inputs: Inputs) -> None:
        """Find the rule by which a server's images become tokens: what it counted of a request with images less what
        it counts of the same text, which is 2 more for each image, for the tokens around it."""
        shown = inputs.warm_up("warm-up/0")
        asked = [number for number, made in enumerate(shown) if made.request.images][:TWINS]
        if not asked:
            return
        twins = [Made(replace(shown[number].request, images=()), "") for number in asked]
        alone = await closed_loop(self._sender(system), self._requests(system, twins), 1, on_done=self.run.live.tick)
        self.run.found.fail(system.role, "warm-up", alone.traces)
        if self.run.found.failures:
            return
        counts = {trace.number: trace.prompt_tokens for trace in self._first[system.role].traces}
        texts = {trace.number: trace.prompt_tokens for trace in alone.traces}
        found: list[tuple[tuple[tuple[int, int], ...], int]] = []
        for at, number in enumerate(asked):
            both, text = counts.get(number), texts.get(at)
            if both is None or text is None or both <= text:
                return  # it counts no tokens, or none of images
            found.append((shown[number].sizes, both - text))
        source = Path(self.config.sources[system.role])
        own = rule_of(source) if source.is_dir() else None
        for rule in (*([own] if own else []), *RULES.values()):
            if all(sum(rule.tokens(*size) + 2 for size in sizes) == count for sizes, count in found):
                self._rules[system.role] = rule
                return
        (width, height), count = found[0][0][0], found[0][1]
        self.run.found.notes.append(
            f"the {system.role}'s server counts {count} tokens for {_images(len(found[0][0]))} of {width}x{height}, by "
            "no rule that is known: tokens of images are not told apart from those of text"
        )

    async def _counts_chunks(self, system: System) -> bool:
        """Ask a server to count tokens in every chunk, and return whether it does. It is asked of both or of neither:
        they get the same requests."""
        first = self._inputs(system).warm_up("warm-up/counted")[0].request
        body = first.body(system.endpoint.model, count_chunks=True)
        block = await closed_loop(self._sender(system), [_Request(0, "", body, first.max_tokens)], 1)
        return all(trace.failure is None and trace.counts for trace in block.traces)

    async def _wave(self, system: System, concurrency: int, shown: Sequence[Made]) -> Block:
        requests = self._requests(system, shown)
        block = await closed_loop(self._sender(system), requests, concurrency, on_done=self.run.live.tick)
        self.run.found.fail(system.role, "warm-up", block.traces)
        # The second time one by one, nothing is compiled any more.
        if not self.run.found.failures:
            self._pace[system.role, concurrency] = min(map(metrics.e2e, block.traces))
        return block

    def _allowed(self, role: Role, load: Load, count: int) -> int:
        """How many requests of a block of ``count`` may fail: a share of those of all rounds, less those that did."""
        rounds = self.run.found.stretches().get((role, load), {}).values()
        return max(0, int(FAILED_SHARE * count * self.config.rounds) - sum(len(each.block.failed) for each in rounds))

    def _expected(self, role: Role, load: Load | None) -> int:
        """How many requests a load makes, about; None stands for a sweep."""
        config = self.config
        if load is None:
            return config.round_requests * (1 + config.sweep_rates) + max(
                config.round_requests, 4 * config.sweep_concurrency
            )
        if load.speed is not None:
            return 0 if self.run.traffic is None else -(-len(self.run.traffic.chats) // config.rounds)
        if load.concurrency is None:
            rate = load.rate_per_s or 0.0
            count = config.round_requests if config.duration_s is None else rate * config.duration_s
            return math.ceil(count + rate * config.ramp_s / 2)
        pace = self._pace[role, load.concurrency]
        on_ramp = math.ceil(load.concurrency * config.ramp_s / 2 / pace)
        if config.duration_s is None:
            turns = self._inputs(self.run.systems[0]).turns
            return on_ramp + config.block_requests(load.concurrency, turns)
        return on_ramp + max(math.ceil(load.concurrency * config.duration_s / pace), WAVES * load.concurrency)

    async def _watched(self, system: System, load: Awaitable[Block], offered_per_s: float | None = None) -> Stretch:
        """Run a load between two looks at the server's counters and the GPUs'."""
        client, meter = self.run.clients[system.role], self._meter(system)
        before, began = await server_metrics.read(client), meter.joules() if meter else None
        block = await load
        ended = meter.joules() if meter else None
        return Stretch(
            block,
            offered_per_s,
            ServerPoint.between(before, await server_metrics.read(client)),
            ended - began if began is not None and ended is not None and ended >= began else None,
        )

    def _meter(self, system: System) -> energy.Meter | None:
        """Of the GPUs of a server that runs here; of others nothing is known."""
        if system.role not in self._meters:
            self._meters[system.role] = energy.open_meter(_tree(system.pid)) if system.pid else None
        return self._meters[system.role]

    async def _closed(self, system: System, load: Load, round_: int) -> Stretch:
        config, role, concurrency = self.config, system.role, load.concurrency or 1
        count = self._expected(role, load)
        allowed = self._allowed(role, load, count)
        if config.duration_s is not None:
            count = math.ceil(SPARE * count) + concurrency
        inputs = self._inputs(system)
        stretch = await self._watched(
            system,
            closed_loop(
                self._sender(system),
                self._requests(system, inputs.made(f"load/{round_}/{concurrency}", count, chats=True)),
                concurrency,
                duration_s=config.duration_s,
                at_least=WAVES * concurrency,
                ramp_s=config.ramp_s,
                failures=allowed,
                follows=_follows if inputs.turns > 1 else None,
                on_done=self.run.live.tick,
            ),
        )
        block = stretch.block
        if len(block.failed) > allowed or not any(trace.failure is None for trace in block.traces):
            self.run.found.fail(role, f"load, {load.name}", block.failed)
            if not self.run.found.failures:
                raise BenchError(
                    f"load, {load.name}: every request began on the ramp of {config.ramp_s:g} s and none was left to "
                    "measure; shorten --ramp, or raise --duration or --requests"
                )
        else:
            seen = min(metrics.e2e(trace) for trace in block.traces if not trace.failure)
            self._pace[role, concurrency] = min(seen, self._pace[role, concurrency])
        return stretch

    async def _open(self, system: System, load: Load, round_: int) -> Stretch:
        config, role, rate = self.config, system.role, load.rate_per_s or 0.0
        moments = schedule(
            rate,
            count=config.round_requests if config.duration_s is None else None,
            duration_s=config.duration_s,
            arrivals=config.arrivals,
            burstiness=config.burstiness,
            ramp_s=config.ramp_s,
            seed=round_,  # equal for both systems
        )
        if len(moments) == 0:
            raise BenchError(
                f"--rate {rate:g} for --duration {config.duration_s:g}: no request is due in that time; raise one of "
                "them"
            )
        stretch = await self._watched(
            system,
            open_loop(
                self._sender(system),
                self._requests(system, self._inputs(system).made(f"load/{round_}/rate/{rate:g}", len(moments))),
                moments,
                in_flight=IN_FLIGHT,
                waiting=IN_FLIGHT,
                failures=self._allowed(system.role, load, len(moments)),
                on_done=self.run.live.tick,
            ),
            rate,
        )
        self._fail_without_answers(role, f"load, {load.name}", stretch.block)
        if stretch.block.stopped:
            self._ceiling[role] = rate
        return stretch

    async def _replay(self, system: System, load: Load, round_: int) -> Stretch:
        """Send a stretch of the trace at its own times; each round has another one, so that no request is sent
        twice."""
        if self.run.traffic is None or load.speed is None:
            raise BenchError("a replay takes a recorded trace: --traffic")
        traffic = self.run.traffic.stretch(round_, self.config.rounds)
        moments = replay(traffic.due(load.speed))
        made = self._inputs(system, traffic).made(f"load/{round_}/{load.name}", len(moments))
        stretch = await self._watched(
            system,
            open_loop(
                self._sender(system),
                self._requests(system, made),
                moments,
                in_flight=IN_FLIGHT,
                waiting=IN_FLIGHT,
                failures=self._allowed(system.role, load, len(moments)),
                on_done=self.run.live.tick,
            ),
            moments.rate,
        )
        self._fail_without_answers(system.role, f"load, {load.name}", stretch.block)
        return stretch

    async def _sweep(self, system: System, round_: int) -> list[tuple[Load, Stretch]]:
        config = self.config
        result = await sweep(
            self._sender(system),
            lambda name, count: self._requests(system, self._inputs(system).made(f"sweep/{round_}/{name}", count)),
            SweepPlan(
                rates=config.sweep_rates,
                concurrency=config.sweep_concurrency,
                single_requests=config.round_requests,
                requests=config.round_requests,
                duration_s=config.duration_s or 0.0,
                ramp_s=config.ramp_s,
                arrivals=config.arrivals,
                burstiness=config.burstiness,
                failed_share=FAILED_SHARE,
                rounds=config.rounds,
                failed={
                    load.name.removeprefix("sweep: "): sum(len(stretch.block.failed) for stretch in rounds.values())
                    for (role, load), rounds in self.run.found.stretches().items()
                    if role == system.role and load.name.startswith("sweep: ")
                },
                seed=1000 * round_,
                slos=config.slos,
            ),
            on_done=self.run.live.tick,
        )
        for point in result.points:
            self._fail_without_answers(system.role, f"sweep, {point.name}", point.block)
        return [(_load(point, config), _stretch(point)) for point in result.points]

    def _fail_without_answers(self, role: Role, phase: str, block: Block) -> None:
        if not any(trace.failure is None for trace in block.traces):
            self.run.found.fail(role, phase, [*block.ramp, *block.traces])


def _images(count: int) -> str:
    return "an image" if count == 1 else f"{count} images, the first"


def _load(point: Point, config: BenchConfig) -> Load:
    """What a point of a sweep is called; rates are told as shares, which are the same in every round."""
    return Load(
        kind=point.kind,
        name=f"sweep: {point.name}",
        concurrency=point.concurrency,
        arrivals=None if point.fraction is None else config.arrivals,
        share=point.fraction,
    )


def _stretch(point: Point) -> Stretch:
    block = point.block if point.block.stopped else replace(point.block, stopped=point.stopped)
    return Stretch(block, point.offered_per_s)


def _tree(pid: int) -> set[int]:
    """The ids of a process and its descendants."""
    try:
        return {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return {pid}
