"""One `qvl bench` from its settings to its report: questions, servers, measurement, judgement."""

from __future__ import annotations

import asyncio
import filecmp
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, get_args
from urllib.parse import urlsplit

from bench.load.endpoint import discover, normalise_url, public_url
from bench.machine import resources
from bench.questions import tasks
from bench.questions.datasets import LAYOUTS, load_dataset
from bench.questions.observe import Item, items_from_images, items_from_questions
from bench.questions.tasks import Question
from bench.report.build import build, workload
from bench.report.fidelity import digest
from bench.report.schema import Memory, Report, Role, SystemInfo
from bench.run.boot import Abort, Here, Server, Start, booted
from bench.run.journal import Journal
from bench.run.measure import Measurements, Plan, Progress, System, measure
from toolkit.errors import BenchError, ManifestError

__all__ = ["Dataset", "Settings", "dataset", "is_url", "run"]

ROLES: tuple[Role, ...] = get_args(Role)
DEMO = "demo"
NONE = "none"


@dataclass(frozen=True, slots=True)
class Settings:
    """What `qvl bench` was told.

    Attributes:
        sources: of each system a directory, a hub id, ``demo``, or the URL of a server.
        tasks: ``demo``, ``none``, a file of questions, or a set of `datasets.LAYOUTS` as ``NAME[:SOURCE][@SPLIT]``.
        per_task: at most so many questions of each task; None takes all.
        images: a directory of pictures that fidelity is measured on, instead of on the questions.
        image_prompt: what is asked about each of them.
        fidelity: so many of the questions are taken for fidelity; 0 for none.
        margin: a loss of accuracy that would not matter, as a fraction of 1, above 0.
        seed: of sampling questions and of resampling.
        side_by_side: whether servers that this run starts live at the same time.
        serve_arguments: passed on to the servers.
    """

    sources: dict[Role, str]
    plan: Plan
    tasks: str
    per_task: int | None
    images: Path | None
    image_prompt: str
    fidelity: int
    margin: float
    seed: int
    side_by_side: bool
    api_key: str | None
    serve_arguments: tuple[str, ...]
    command: str

    def __post_init__(self) -> None:
        if not 0.0 < self.margin < 1.0:
            raise BenchError(
                f"--margin {100 * self.margin:g}: must be above 0 and below 100 points; no number of questions rules "
                "out every loss"
            )
        if self.fidelity < 0:
            raise BenchError(f"--fidelity {self.fidelity}: must be 0 or more")

    def asked(self, questions: Sequence[Question], items: Sequence[Item]) -> dict[str, str]:
        """Return what decides the measurement, by the names of the options: a run goes on only where all is equal."""
        plan = self.plan
        return {
            "--baseline": self.sources["baseline"],
            "--candidate": self.sources["candidate"],
            "--tasks": self.tasks,
            "the questions' SHA-256": tasks.digest(questions) if questions else "none",
            "--images": str(self.images),
            "the SHA-256 of what fidelity is measured on": digest(items),
            "--per-task": str(self.per_task),
            "--answer-tokens": str(plan.answer_tokens),
            "--margin": f"{100 * self.margin:g}",
            "--seed": str(self.seed),
            "--concurrency": ",".join(map(str, plan.concurrencies)) or NONE,
            "--rate": ",".join(f"{rate:g}" for rate in sorted(plan.rates)) or NONE,
            "--arrivals": plan.arrivals,
            "--sweep": f"{plan.sweep} rates up to {plan.sweep_concurrency} in flight" if plan.sweep else NONE,
            "--requests": str(plan.requests),
            "--duration": str(plan.duration_s),
            "--ramp": f"{plan.ramp_s:g}",
            "--rounds": str(plan.rounds),
            "--output-tokens": str(plan.output_tokens),
            "--prompt-tokens": str(plan.prompt_tokens),
            "--images-per-request": str(plan.images),
            "--image-sizes": ",".join("text" if size is None else f"{size[0]}x{size[1]}" for size in plan.image_sizes),
            "--slo": ",".join(map(str, plan.slos)) or NONE,
            "--timeout": f"{plan.timeout_s:g}",
            "--question-concurrency": str(plan.question_concurrency),
            "--sequential": str(not self.side_by_side),
            "--serve-arg": " ".join(self.serve_arguments) or NONE,
        }


def is_url(source: str) -> bool:
    """Whether a system is given by the URL of its server."""
    return source.startswith(("http://", "https://"))


class Booter(Protocol):
    """Knows how servers are started."""

    @property
    def at_once(self) -> bool:
        """Whether servers may boot at the same time."""

    def boot(self, source: str) -> tuple[Start, Abort]:
        """Return how to start a server for a directory, hub id or ``demo``, and how to end it while it boots."""


#: URL -> the server of `qvl serve --detach` that listens there, on this machine.
FindHere = Callable[[str], Here | None]
#: (directory, questions a task or None for the default) -> the file of questions written there.
WriteDemo = Callable[[Path, int | None], Path]


def run(
    settings: Settings,
    *,
    boot: Booter,
    write_demo: WriteDemo,
    progress: Progress,
    find_here: FindHere = lambda url: None,
    out: Path | None = None,
    resume: bool = False,
    logs: list[Path] | None = None,
) -> Report:
    """Measure and return the report, which may be a failed one, or a partial one when Ctrl-C came.

    Args:
        boot: starts servers for what is no URL.
        write_demo: writes the demo's questions.
        find_here: finds a given URL's server on this machine, whose memory and checkpoint can then be told.
        out: directory in which measurements are kept as they come; None keeps none.
        resume: go on with what is kept there.
        logs: filled with the logs of servers that were started.

    Raises:
        QvlError: what is asked for can't be measured: nothing was, and there is no report.
        KeyboardInterrupt: Ctrl-C came before anything was measured.
    """
    clock = _Clock()
    with ExitStack() as stack:
        questions, source = _questions(settings, stack, write_demo)
        items, items_source = _items(settings, questions)
        if not (questions or items or settings.plan.measures_speed):
            raise BenchError("nothing to measure: --tasks none, no --images, and no load (--concurrency none)")
        journal = Journal(out, settings.asked(questions, items)) if out else None
        found = journal.resume() if journal and resume else Measurements()
        if journal:
            stack.callback(journal.close)
        # Servers that are there already are asked before any is started.
        for role in ROLES:
            if is_url(settings.sources[role]):
                asyncio.run(discover(settings.sources[role], settings.api_key))
        here = {role: find_here(settings.sources[role]) for role in ROLES if is_url(settings.sources[role])}
        local: list[Role] = [role for role in ROLES if not is_url(settings.sources[role])]
        together = settings.side_by_side or len(local) < 2
        groups: list[list[Role]] = [list(ROLES)] if together else [[role] for role in ROLES]
        infos: dict[Role, SystemInfo] = {}
        interrupted = False
        for group in groups:
            starts = {role: boot.boot(settings.sources[role]) for role in group if role in local}
            with booted(starts, at_once=bool(starts) and boot.at_once) as servers:
                if logs is not None:
                    logs += [server.log for server in servers.values()]
                known = {role: servers.get(role) or here.get(role) for role in group}
                systems = [_system(role, settings, servers.get(role), known[role]) for role in group]
                try:
                    asyncio.run(
                        measure(
                            systems,
                            questions,
                            settings.plan,
                            items=items,
                            found=found,
                            keep=journal,
                            progress=progress,
                        )
                    )
                except KeyboardInterrupt:
                    if found.empty:
                        raise
                    interrupted = True
                infos |= {s.role: _info(s, settings, known[s.role], found) for s in systems}
            if found.failures or interrupted:
                break
        for role in ROLES:  # a run that ended at the first system never met the second
            infos.setdefault(role, _unmet(role, settings))
        infos = _distinct(infos)
        # Here, for it reads pictures, which the demo's questions have in a directory that goes with the stack.
        return build(
            found,
            questions,
            {role: infos[role] for role in ROLES},
            workload(settings.plan, questions, source=source, interleaved=together, seed=settings.seed),
            settings.plan,
            margin=settings.margin,
            duration_s=clock.seconds(),
            command=settings.command,
            items=items,
            items_source=items_source,
            interrupted=interrupted,
            warnings=[
                *_warnings(settings, infos),
                *clock.doubts(),
                *(["the run was interrupted and went on: its parts were measured at different times"] * resume),
            ],
        )


class _Clock:
    """How long a run takes, by a clock that nobody sets; and whether the one on the wall was set meanwhile."""

    #: Seconds that the two may drift apart: what keeps a clock right moves it by less.
    STEP_S = 2.0

    def __init__(self) -> None:
        self._began, self._wall = time.monotonic(), time.time()

    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._began

    def doubts(self) -> list[str]:
        """Say that the machine's clock was set, or the machine slept."""
        step = time.time() - self._wall - self.seconds()
        if abs(step) < self.STEP_S:
            return []
        return [
            f"the machine's clock moved by {step:+.0f} s against the time that passed: it was set, or the machine "
            "slept; times here are by a clock that is never set, but what ran while it slept is not to be trusted"
        ]


def _items(settings: Settings, questions: Sequence[Question]) -> tuple[list[Item], str]:
    """What fidelity is measured on, and where it is from."""
    if settings.images is not None:
        return items_from_images(settings.images, settings.image_prompt), f"pictures in {settings.images}"
    count = min(settings.fidelity, len(questions))
    # Evenly from all questions, which come task by task.
    chosen = [questions[number * len(questions) // count] for number in range(count)]
    return items_from_questions(chosen), "questions as above"


def _questions(settings: Settings, stack: ExitStack, write_demo: WriteDemo) -> tuple[Sequence[Question], str | None]:
    if settings.tasks == NONE:
        return [], None
    if settings.tasks == DEMO:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvl-questions-")))
        return tasks.load_questions(write_demo(directory, settings.per_task)), DEMO
    chosen = dataset(settings.tasks)
    if chosen:
        shown = f"{chosen.name}, split {chosen.split} of {chosen.source}"
        found = load_dataset(
            chosen.name, chosen.source, split=chosen.split, per_task=settings.per_task, seed=settings.seed
        )
        return found, shown
    file = Path(settings.tasks)
    if not file.exists():
        raise ManifestError(
            f"--tasks {settings.tasks!r}: no such file of questions; pass FILE.jsonl, demo, none, or one of "
            f"{', '.join(LAYOUTS)} (alone, or as {next(iter(LAYOUTS))}:DIR@SPLIT)"
        )
    questions = tasks.load_questions(file)
    if settings.per_task is not None:
        questions = tasks.pick(questions, settings.per_task, settings.seed)
    return questions, file.name


@dataclass(frozen=True, slots=True)
class Dataset:
    """A set of questions, where it is read from, and its split."""

    name: str
    source: str
    split: str


def dataset(text: str) -> Dataset | None:
    """Read ``NAME[:SOURCE][@SPLIT]`` with NAME in `datasets.LAYOUTS`; None when it is something else.

    Raises:
        ManifestError: nothing stands after the colon or the @.
    """
    match = re.match(rf"({'|'.join(LAYOUTS)})(?=[:@]|$)", text)
    if not match:
        return None
    layout, rest = LAYOUTS[match[1]], text[match.end() :]
    source, at, split = rest, "", layout.split
    if "@" in rest and not (rest.startswith(":") and Path(rest[1:]).is_dir()):  # an @ may be part of a directory's name
        source, at, split = rest.rpartition("@")
    if source == ":" or (at and not split):
        raise ManifestError(f"--tasks {text!r}: write {match[1]}[:DIR or hub id][@SPLIT]")
    return Dataset(match[1], source[1:] or layout.hub_id, split)


def _system(role: Role, settings: Settings, server: Server | None, known: Server | Here | None) -> System:
    url, key = (server.url, server.api_key) if server else (settings.sources[role], settings.api_key)
    return System(role, asyncio.run(discover(url, key)), known.pid if known else None)


def _name(source: str) -> str:
    """A short name for a directory, a hub id or ``demo``."""
    return Path(source).name or Path(source).resolve().name or source


def _info(system: System, settings: Settings, server: Server | Here | None, found: Measurements) -> SystemInfo:
    """Describe a system while it still runs: its memory is read after the load."""
    source, end = settings.sources[system.role], system.endpoint
    kv_cache = found.kv_cache_tokens.get(system.role)
    if server is None:
        shown = public_url(end.url)
        return SystemInfo(
            role=system.role,
            label=end.model,
            source=public_url(source),
            booted=False,
            model=end.model,
            url=shown,
            server_version=end.version,
            memory=Memory(kv_cache_tokens=kv_cache),
        )
    given = is_url(source)
    disk = resources.disk(server.checkpoint)
    host = resources.host_memory(server.pid)
    try:
        log = server.log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        log = ""
    return SystemInfo(
        role=system.role,
        label=end.model if given else _name(source),
        source=public_url(source) if given else source,
        booted=not given,
        model=end.model,
        url=public_url(end.url) if given else end.url,
        server_version=end.version,
        quantization=resources.quantization(server.checkpoint),
        disk_bytes=disk.total,
        disk_weights_bytes=disk.weights,
        memory=Memory.model_validate(
            {
                "host_bytes": host.total if host else None,
                "host_kind": host.kind if host else None,
                "gpu_bytes": resources.gpu_memory(server.pid),
                "weights_bytes": resources.weights_in_memory(log),
                "kv_cache_tokens": kv_cache,
            }
        ),
        serve_arguments=[] if given else list(settings.serve_arguments),
    )


def _unmet(role: Role, settings: Settings) -> SystemInfo:
    source = settings.sources[role]
    shown = public_url(source) if is_url(source) else source
    label = urlsplit(shown).netloc if is_url(source) else _name(source)
    return SystemInfo(role=role, label=label, source=shown, booted=False, model="", url="")


def _distinct(infos: dict[Role, SystemInfo]) -> dict[Role, SystemInfo]:
    """Tell the two apart by role where their names are equal."""
    if infos["baseline"].label != infos["candidate"].label:
        return infos
    return {role: info.model_copy(update={"label": f"{info.label} ({role})"}) for role, info in infos.items()}


def _warnings(settings: Settings, infos: dict[Role, SystemInfo]) -> list[str]:
    a, b = settings.sources["baseline"], settings.sources["candidate"]
    if is_url(a) and is_url(b):
        if normalise_url(a) == normalise_url(b):
            return ["baseline and candidate are one server: differences are noise"]
        names = [infos[role].model for role in ROLES]
        if names[0] and names[0] == names[1]:
            return [f"both servers call their model {names[0]}: when it is one checkpoint, differences are noise"]
        return []
    local = not is_url(a) and not is_url(b)
    if a == b or (local and _same_weights(Path(a), Path(b))):
        return ["baseline and candidate are the same model: differences are noise"]
    if local and infos["baseline"].booted != infos["candidate"].booted:
        return ["only one of the two systems was reached"]
    return []


def _same_weights(a: Path, b: Path) -> bool:
    """Whether two directories hold the same weights, byte for byte; they are read only when their sizes are equal."""
    files = [{path.name: path for path in directory.glob("*.safetensors")} for directory in (a, b)]
    if not files[0] or files[0].keys() != files[1].keys():
        return False
    return all(filecmp.cmp(path, files[1][name], shallow=False) for name, path in files[0].items())
