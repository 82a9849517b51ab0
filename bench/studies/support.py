"""What runs where: family x format x engine x card, from tests and results, never typed: `make support-matrix`.

    python -m bench.studies support

A cell says what it stands on, the strongest there is:

- measured: a report in docs/results of that family and format on that card.
- tested: a test, marked ``pytest.mark.supports(family, format, engine, card)``, that shows it.
- computed: `toolkit.checkpoint.engines` finds nothing in the engine's rules against a checkpoint of a common shape.
- no: it does find something, which is told.

What is claimed and computed to be impossible is an error. The page is committed, and a test compares it with what is
made.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.machine.resources import FLOATS
from toolkit.checkpoint.anatomy import expected_tensors
from toolkit.checkpoint.checkpoint import Checkpoint, QuantizationInfo, TensorInfo
from toolkit.checkpoint.engines import Engine, engines
from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.errors import BenchError
from toolkit.models.families import FAMILIES
from toolkit.models.family import Family

__all__ = ["Claim", "Place", "claims", "made", "reports", "run"]

#: As tests name it; all others are names of `LAYOUTS`.
FLOAT = "16 bits"
FORMATS = (FLOAT, *LAYOUTS)
#: By what tests call an engine: what `engines` calls it on a CPU and on GPUs, where it says anything.
ENGINES: dict[str, dict[str, str]] = {
    "vllm": {"cpu": "vLLM on CPUs", "gpu": "vLLM on GPUs"},
    "transformers": {},
    "autoawq": {"gpu": "AutoAWQ 0.2.9"},
}
_TITLES = {"vllm": "vLLM", "transformers": "transformers", "autoawq": "AutoAWQ 0.2.9"}
CPU, OTHER, ANY = "CPU", "other NVIDIA", "NVIDIA"
#: A common shape: the 7B's widths, which the kernels' rules are fond of, and few layers, which they don't look at.
_SHAPE = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_hidden_layers": 1,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
_GROUP = 128
_MARK = "supports"


@dataclass(frozen=True, order=True)
class Place:
    """A cell of the matrix."""

    #: ``model_type`` of the family.
    family: str
    format: str
    engine: str
    #: "CPU", or a GPU's name.
    card: str


@dataclass(frozen=True, order=True)
class Claim:
    """What a test or a report shows of a cell."""

    place: Place
    #: "measured" or "tested".
    kind: str
    #: A test's file and name, or a report's file, from the root.
    source: str


def claims(tests: Path) -> Iterator[Claim]:
    """Yield what the tests below a directory are marked to show. Raises BenchError for an unknown mark."""
    for file in sorted(tests.rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if f"mark.{_MARK}(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef):
                continue
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Attribute) and mark.func.attr == _MARK:
                    where = f"{file.relative_to(tests.parent)}::{node.name}"
                    yield Claim(_place([_constant(each, where) for each in mark.args], where), "tested", where)


def _constant(node: ast.expr, where: str) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise BenchError(f"{where}: pytest.mark.{_MARK} takes four texts: family, format, engine, card")
    return node.value


def _place(words: list[str], where: str) -> Place:
    if len(words) != 4:
        raise BenchError(f"{where}: pytest.mark.{_MARK} takes four texts: family, format, engine, card")
    place = Place(*words)
    for given, known in (
        (place.family, {family.model_type for family in FAMILIES}),
        (place.format, set(FORMATS)),
        (place.engine, set(ENGINES)),
    ):
        if given not in known:
            raise BenchError(f"{where}: {given!r} is none of {', '.join(sorted(known))}")
    return place


def reports(results: Path) -> Iterator[Claim]:
    """Yield what the reports of `qvl bench` below a directory have measured: a claim for each system of each."""
    for file in sorted(results.rglob("report.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        environment = found.get("environment")
        if not isinstance(found.get("systems"), dict) or not isinstance(environment, dict):
            continue  # another study's
        gpus = environment.get("gpus") or []
        card = _card(str(gpus[0])) if gpus else CPU
        page = file.with_suffix(".md")
        source = str((page if page.exists() else file).relative_to(results.parent.parent))
        for system in found["systems"].values():
            family, form = _family(system), _format(str(system.get("quantization")))
            if family is not None and form is not None:
                yield Claim(Place(family, form, "vllm", card), "measured", source)


def _card(name: str) -> str:
    """Return a GPU's short name: "NVIDIA H100 80GB HBM3, 81559 MiB, ..." is an H100."""
    return name.partition(",")[0].removeprefix("NVIDIA ").partition(" ")[0]


def _family(system: Mapping[str, Any]) -> str | None:
    """Return the family of a report's system. Reports from before they said it are of the one that there was."""
    found = system.get("model_type", "qwen2_vl")
    return found if any(family.model_type == found for family in FAMILIES) else None


def _format(words: str) -> str | None:
    """Return the format that a report's words for a system's weights mean."""
    if words in FLOATS:
        return FLOAT
    return next((name for name in LAYOUTS if words.startswith(name) or words.endswith(f", {name}")), None)


def _verdicts(family: Family, form: str) -> dict[str, Engine]:
    """Return what `engines` says of a checkpoint of a family in a format, by engine."""
    text = {**_SHAPE, "max_position_embeddings": family.max_positions}
    config = {"architectures": [family.architecture], "model_type": family.model_type, **text, "vision_config": {}}
    bare = Checkpoint(Path(family.title), family, config, text, {}, {}, None, family.hub.layers)
    info = None if form == FLOAT else QuantizationInfo(4, _GROUP, True, form, ("visual",))
    tensors: dict[str, TensorInfo] = {}
    for expected in expected_tensors(bare):
        module = expected.name.removesuffix(".weight")
        packed = expected.linear and not module.startswith(family.hub.head) and ".visual." not in f".{module}."
        if info is not None and packed:
            outputs, inputs = expected.shape
            shapes = info.layout.shapes(inputs, outputs, _GROUP)
            tensors |= {f"{module}.{part}": _tensor(f"{module}.{part}", shape) for part, shape in shapes.items()}
        else:
            tensors[expected.name] = _tensor(expected.name, expected.shape)
    found = engines(replace(bare, tensors=tensors, quantization=info))
    return {engine.name: engine for engine in found}


def _tensor(name: str, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(name, "I32", shape, 0, Path(), 0)


def made(root: Path) -> str:
    """Return docs/support.md, from the tests and results of a checkout. Raises BenchError for a claim that can't be."""
    found = sorted({*claims(root / "tests"), *reports(root / "docs" / "results")})
    cards = sorted({claim.place.card for claim in found} - {CPU})
    columns = [("vllm", CPU), *(("vllm", card) for card in cards), ("vllm", OTHER)]
    columns += [("transformers", CPU), ("autoawq", ANY)]
    notes: dict[str, int] = {}
    rows = []
    for family in FAMILIES:
        for form in FORMATS:
            verdicts = _verdicts(family, form)
            cells = []
            for engine, card in columns:
                place = Place(family.model_type, form, engine, card)
                cells.append(_cell(place, [each for each in found if each.place == place], verdicts, notes))
            rows.append(f"| {family.title} | {form} | {' | '.join(cells)} |")
    heads = [f"{_TITLES[engine]}, {card}" for engine, card in columns]
    lines = [
        *_PREFACE,
        f"| family | format | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
        *rows,
        "",
        *(f"{number}. {note}" for note, number in notes.items()),
    ]
    return "\n".join(lines) + "\n"


_PREFACE = (
    "# What runs where",
    "",
    "Made by `make support-matrix` from the tests and the reports in [results](results/README.md), not by hand.",
    "",
    "- **measured**: a report has figures of it. **tested**: a test shows it; `make test` runs those on a CPU.",
    "- **computed**: nothing in the engine's rules is against it (`qvl inspect` looks at yours); nobody has tried.",
    "- **no**: something is. **-**: nothing is known.",
    "",
)


def _cell(place: Place, found: Iterable[Claim], verdicts: dict[str, Engine], notes: dict[str, int]) -> str:
    """Return a cell's words, with the number of its note."""
    title = ENGINES[place.engine].get("cpu" if place.card == CPU else "gpu")
    verdict = verdicts.get(title) if title else None
    shown: dict[str, list[str]] = {}
    for claim in found:
        shown.setdefault(claim.kind, []).append(claim.source)
    if shown and verdict is not None and verdict.runs == "no":
        raise BenchError(f"{place} is {' and '.join(shown)}, and computed not to run: {verdict.detail}")
    for kind in ("measured", "tested"):
        if kind in shown:
            return f"{kind} {_noted(_sources(kind, shown[kind]), notes)}"
    if verdict is None:
        return "-"
    if verdict.runs == "no":
        return f"no {_noted(verdict.detail, notes)}"
    return f"computed {_noted(verdict.detail, notes)}" if verdict.detail else "computed"


def _sources(kind: str, found: list[str]) -> str:
    if kind == "measured":
        where = {each: each.removeprefix("docs/") for each in found}
        return ", ".join(f"[{Path(each).parent.name}]({path})" for each, path in where.items())
    return ", ".join(f"`{each}`" for each in dict.fromkeys(found))


def _noted(note: str, notes: dict[str, int]) -> str:
    return f"({notes.setdefault(note, len(notes) + 1)})"


def run(out: Path | None = None) -> None:
    """Write docs/support.md of this checkout, or ``out``."""
    from toolkit.console import out as stdout
    from toolkit.files import write_whole
    from toolkit.paths import source_root

    root = source_root()
    target = out or root / "docs" / "support.md"
    write_whole(target, made(root))
    stdout.print(str(target), highlight=False)
