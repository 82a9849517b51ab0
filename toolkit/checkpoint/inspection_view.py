"""What `qvl inspect` prints: an `Inspection` as tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from toolkit.checkpoint.engines import Engine
from toolkit.checkpoint.inspection import Inspection, Part, Problem
from toolkit.checkpoint.left_out import describe
from toolkit.models.families import family_of
from toolkit.tables import table
from toolkit.units import human_bytes, human_count

__all__ = ["render"]

_VERDICTS = {"yes": ("yes", "green"), "repack": ("after repacking", "yellow"), "no": ("no", "red")}
_SHOWN = 20


def render(inspection: Inspection) -> RenderableType:
    """Lay an inspection out for the terminal: what it is, what it weighs, where it runs, what is wrong."""
    return Group(
        Text(inspection.path, style="bold"),
        _facts(inspection),
        "",
        _parts(inspection),
        "",
        _engines(inspection.engines),
        "",
        _problems(inspection.problems),
    )


def _facts(inspection: Inspection) -> Table:
    facts = Table.grid(padding=(0, 2))
    model = inspection.model
    heads = f"{model['num_attention_heads']} heads ({model['num_key_value_heads']} key-value)"
    rows = {
        "architecture": f"{inspection.architecture}, names as {_names(inspection.names)}",
        "language": f"{model['num_hidden_layers']} layers, width {model['hidden_size']}, "
        f"inner {model['intermediate_size']}, {heads}, {model['vocab_size']:,} tokens",
        "vision": f"{model['vision_depth']} blocks, width {model['vision_width']}",
        "lm_head": "the embeddings (tied)" if model["tied_lm_head"] else "its own matrix",
        "format": inspection.format,
    }
    quantization = inspection.quantization
    if quantization is not None:
        size = quantization["group_size"]
        groups = "one group a row" if size == -1 else f"groups of {size}"
        zeros = "zero points" if quantization["zero_point"] else "no zero points"
        per_weight = f"{quantization['bits_per_weight']:.4g} bits a weight with scales"
        rows["format"] += f", {quantization['bits']} bits, {groups}, {zeros} ({per_weight})"
        layers = int(model["num_hidden_layers"])
        rows["quantized"] = _quantized(quantization["quantized"], layers)
        rows["left"] = "; ".join(filter(None, (", ".join(quantization["left"]), _left(inspection, layers))))
    if inspection.made:
        rows["made"] = _made(inspection.made)
    for key, value in rows.items():
        if value:
            facts.add_row(Text(key, style="dim"), Text(value))
    return facts


def _left(inspection: Inspection, layers: int) -> str:
    """Say which decoder linears are in 16 bits."""
    family = family_of({"architectures": [inspection.architecture]})
    if family is None or inspection.quantization is None:
        return ""
    left = inspection.quantization["left_linears"]
    return describe({(layer, name) for name, where in left.items() for layer in where}, layers, family)


def _quantized(kinds: dict[str, int], layers: int) -> str:
    all_layers = [name for name, count in kinds.items() if count == layers and not name.startswith("vision ")]
    whole = [name.split(".")[-1].removesuffix("_proj") for name in all_layers]
    others = [f"{count} x {name}" for name, count in kinds.items() if name not in all_layers]
    return "; ".join(filter(None, (f"{', '.join(whole)} of all {layers} layers" if whole else "", ", ".join(others))))


def _names(names: str) -> str:
    return "on the hub" if names == "hub" else "transformers 5 saves them"


def _made(made: dict[str, object]) -> str:
    source, conversions = made.get("source"), made.get("conversions")
    told = []
    if isinstance(source, dict) and source.get("model"):
        told.append(f"by qvl from {source['model']}")
    if isinstance(conversions, list) and conversions:
        told += [_conversion(conversion) for conversion in conversions]
    return "; ".join(told)


def _conversion(done: dict[str, object]) -> str:
    """Say what one `qvl convert` did."""
    padded = done.get("intermediate_size")
    parts = [f"repacked {done.get('from')} to {done.get('to')}"] if done.get("from") != done.get("to") else []
    if isinstance(padded, list):
        parts.append("its MLP padded from {} to {}".format(*padded))
    return ", ".join(parts)


def _parts(inspection: Inspection) -> Table:
    shown = table(["part", "parameters", "size", "share"], (1, 2, 3), wrapped=range(4))
    for part in [*inspection.parts, Part("total", inspection.parameters, inspection.nbytes)]:
        style = "bold" if part.name == "total" else ""
        share = f"{100 * part.nbytes / max(inspection.nbytes, 1):.1f} %"
        name = part.name if part.name != "total" else f"total, {inspection.files} file" + "s" * (inspection.files > 1)
        shown.add_row(name, human_count(part.parameters), human_bytes(part.nbytes), share, style=style)
    return shown


def _engines(engines: list[Engine]) -> RenderableType:
    shown = table(["engine", "runs it", "GPUs", "how"], wrapped=range(4))
    for engine in engines:
        verdict, style = _VERDICTS[engine.runs]
        sizes = ", ".join(map(str, engine.tensor_parallel)) if engine.limit or len(engine.tensor_parallel) > 1 else ""
        shown.add_row(engine.name, Text(verdict, style=style), sizes, Text(engine.detail))
    limits = [
        Text(f"{engine.name}: can't be split over {engine.limit}", style="dim") for engine in engines if engine.limit
    ]
    advice = [Text(f"{engine.name}: {engine.advice}", style="dim") for engine in engines if engine.advice]
    return Group(shown, *limits, *advice)


def _problems(problems: list[Problem]) -> RenderableType:
    if not problems:
        return Text("no problems found", style="green")
    styles = {"error": "bold red", "warning": "yellow"}
    lines = [Text(f"{p.level}: {p.message}", style=styles[p.level]) for p in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(Text(f"and {len(problems) - _SHOWN} more (--json has them all)", style="dim"))
    return Group(*lines)
