"""The benchmark's README.md, written from results.json alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.judge.stats import mcnemar, mean_interval
from bench.studies.quantizer.plots import draw
from bench.studies.quantizer.results import later_layers, line
from bench.studies.quantizer.settings import PARTS

__all__ = ["render"]

_OUR_STEPS = ("load", "forward", "scale", "factor", "round", "check", "write")
_STOCK_STEPS = ("capture", "scale", "clip", "pack")
#: What divergence is compared with: the default.
_OURS = "ours"


def render(parts: dict[str, Any], out: Path) -> Path:
    """Write README.md and the plots into ``out`` and return the README's path."""
    plots = draw(parts, out)
    lines = [
        "# The quantizer beside stock AutoAWQ",
        "",
        "Written by `python -m bench.studies quantizer` (`make quant-bench`) from [results.json](results.json). GB are "
        "10^9 bytes. A first layer warms up, so a layer's time is the median of the later ones.",
    ]
    if any(parts[part]["about"]["tiny"] for part in parts):
        lines += ["", "**Made with `--tiny`: these figures show that the script runs, and nothing else.**"]
    if not any(parts[part]["about"]["stock"] for part in ("speed", "quality") if part in parts):
        lines += ["", "Stock AutoAWQ was left out: `--stock-python` names an environment that has it."]
    for part in PARTS:
        title, write = _SECTIONS[part]
        lines += ["", f"## {title}", ""]
        if part not in parts:
            lines += [f"Not measured yet (`python -m bench.studies quantizer --parts {part}`)."]
            continue
        lines += [_made(part, parts[part]["about"]), "", *write(parts[part])]
        if part in plots:
            lines += ["", f"![{title}]({plots[part]})"]
    path = out / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _made(part: str, about: dict[str, Any]) -> str:
    stock = " --stock-python CMD" if about["stock"] and part in ("speed", "quality") else ""
    tiny = " --tiny" if about["tiny"] else ""
    wanted = ("qvl", "python", "torch", "transformers", "autoawq")
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in wanted if name in about["versions"])
    note = f" {about['note']}" if about.get("note") else ""
    command = f"python -m bench.studies quantizer --parts {part}{stock}{tiny}"
    return f"`{command}`, {about['date']}, {about['device']}; {versions}.{note}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size < 1e9 else f"{size / 1e9:.1f} GB"


def _peaks(run: dict[str, Any]) -> list[str]:
    """Return the peaks on GPU and host, each with what was planned where that is known (ours)."""
    cells = []
    for place in ("device", "host"):
        planned = run.get("planned", {}).get(f"{place}_bytes")
        cells.append(_gb(run[f"peak_{place}_bytes"]) + (f" ({_gb(planned)} planned)" if planned else ""))
    return cells


def _p(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else "<0.01"


def _steps(run: dict[str, Any], steps: Sequence[str]) -> list[str]:
    return [f"{later_layers(run, step):.3f}" for step in steps]


def _with_rest(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run of stock AutoAWQ with the seconds of each layer that no step accounts for, as ``rest``."""
    layers = [layer["seconds"] for layer in run["layers"]]
    return {
        "layers": [
            {"seconds": {**s, "rest": s["total"] - sum(s.get(step, 0.0) for step in _STOCK_STEPS)}} for s in layers
        ]
    }


def _speed(part: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    rows, errors, ours, stock = [], [], [], []
    versions: dict[str, str] = {}
    whole: dict[str, Any] = {}
    for shape, found in part["shapes"].items():
        systems = found["systems"]
        whole = systems.get("stock", {})
        versions = whole.get("versions") or versions
        for name, run in systems.items():
            if "failed" in run:
                rows.append([shape.upper(), name, f"failed: {run['failed']}", *[""] * 4])
                continue
            later = later_layers(run)
            faster = f"{later_layers(whole) / later:.1f}x" if "layers" in whole else ""
            first = run["layers"][0]["seconds"]["total"]
            peaks = _peaks(run)
            rows.append([shape.upper(), name, f"{later:.2f}", f"{first:.2f}", faster, *peaks])
            if name == "stock":
                stock.append([shape.upper(), *_steps(_with_rest(run), (*_STOCK_STEPS, "rest"))])
            else:
                ours.append([shape.upper(), name, *_steps(run, _OUR_STEPS)])
        for name, values in found["errors"].items():
            errors.append([shape.upper(), name, *(f"{v:.4f}" for v in values), f"**{sum(values):.4f}**"])
    one = next(iter(part["shapes"].values()))
    lines += [
        f"Decoder layers of the 2B's and 7B's shape with random weights whose channels differ in size; "
        f"{one['samples']} samples, {one['tokens']:,} text tokens, the same ids for all; "
        f"groups of {part['group_size']}.",
        "",
        *_table(["shape", "system", "s a layer", "first layer", "faster than stock", "peak GPU", "peak host"], rows),
        "",
        "Peak GPU is what PyTorch allocated, peak host anonymous resident memory, page cache not counted. Ours are "
        "of the whole run, from the vision tower to the last file.",
        "",
        "Seconds of a layer by step, ours:",
        "",
        *_table(["shape", "system", *_OUR_STEPS], ours),
    ]
    if stock:
        with_versions = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines += [
            "",
            f"Stock ({with_versions}; duo scaling and clipping, its defaults; layers moved to the GPU one by one); "
            "`rest` is what it does between its steps, such as moving the layer and collecting garbage:",
            "",
            *_table(["shape", *_STOCK_STEPS, "rest"], stock),
        ]
    layers = max(len(values) for values in one["errors"].values())
    lines += [
        "",
        "Relative error of a layer's output, |y_q - y|^2 / |y - x|^2 with x the true input, on "
        f"{one['held_out_tokens']:,} tokens that no calibration saw:",
        "",
        *_table(["shape", "weights", *(f"layer {i}" for i in range(layers)), "sum"], errors),
    ]
    return lines + _on_cpu(whole)


def _on_cpu(stock: dict[str, Any]) -> list[str]:
    """Return a warning about errors of stock AutoAWQ when it ran on a CPU."""
    if stock.get("device") != "CPU":
        return []
    return [
        "",
        "Stock AutoAWQ ran on a CPU, where its duo scaling spoils weights ([why](../../awq-on-cpu.md)): its errors "
        "with duo scaling are no measure of it.",
    ]


def _total_last(names: Sequence[str]) -> list[str]:
    """Return each name once, in the order they came, ``total`` at the end."""
    return sorted(dict.fromkeys(names), key=lambda name: name == "total")


def _run_rows(runs: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table of whole runs: wall, phases, peaks."""
    phases = _total_last([phase for run in runs.values() for phase in run["seconds"]])
    rows = []
    for name, run in runs.items():
        wall = [f"**{run['wall']:.1f}**"] if "wall" in run else []
        seconds = [f"{run['seconds'].get(phase, 0.0):.1f}" for phase in phases]
        peaks = _peaks(run)
        rows.append([name, *wall, *seconds, f"{later_layers(run):.2f}", *peaks])
    wall_head = ["command, s"] if "wall" in next(iter(runs.values())) else []
    head = ["", *wall_head, *(f"{phase}, s" for phase in phases), "s a layer", "peak GPU", "peak host"]
    return _table(head, rows)


def _sums(run: dict[str, Any]) -> list[str]:
    """Return a table of the seconds of each step, over all layers."""
    steps = _total_last([step for layer in run["layers"] for step in layer["seconds"]])
    row = [f"{sum(layer['seconds'].get(step, 0.0) for layer in run['layers']):.2f}" for step in steps]
    return _table(["seconds of all layers", *steps], [["", *row]])


def _full(part: dict[str, Any]) -> list[str]:
    data = part["calibration"]
    return [
        f"{len(part['layers'])} layers, random weights, {data['samples']} samples of {data['tokens']:,} tokens, "
        f"{data['vision_tokens']:,} of them of images. From the start of the command to its end, with Python's "
        f"imports, reading the source (just written, so in the page cache) and writing {_gb(part['output_bytes'])}.",
        "",
        *_run_rows({"7B": part}),
        "",
        *_sums(part),
    ]


def _wide(part: dict[str, Any]) -> list[str]:
    data = part["calibration"]
    return [
        f"{len(part['layers'])} layers of 8192 x 29568, {data['samples']} samples of {data['tokens']:,} text tokens.",
        "",
        *_run_rows({"72B": part}),
        "",
        *_sums(part),
    ]


def _cost(part: dict[str, Any]) -> list[str]:
    samples, width = part["samples"], part["width"]
    lines = _table(
        [f"{part['shape'].upper()} shape, samples", "tokens", "s a layer", "forward", "s a million tokens", "peak GPU"],
        [
            [
                str(point["samples"]),
                f"{point['tokens']:,}",
                f"{later_layers(point):.3f}",
                f"{later_layers(point, 'forward'):.3f}",
                f"{later_layers(point) / point['tokens'] * 1e6:.2f}",
                _gb(point["peak_device_bytes"]),
            ]
            for point in samples
        ],
    )
    fixed, each, off = line([(point["tokens"] / 1e6, later_layers(point)) for point in samples])
    lines += ["", f"In a line: {fixed:.3f} s + {each:.2f} s a million tokens, at most {off:.0%} off.", ""]
    lines += _table(
        ["shape", "weights in a layer", "s a layer", "ns a weight", "peak GPU"],
        [
            [
                point["shape"].upper(),
                f"{point['weights'] / 1e6:.0f} M",
                f"{later_layers(point):.3f}",
                f"{later_layers(point) / point['weights'] * 1e9:.2f}",
                _gb(point["peak_device_bytes"]),
            ]
            for point in width
        ],
    )
    return lines


def _quality(part: dict[str, Any]) -> list[str]:
    source, methods = part["source"], part["methods"]
    tasks = list(source["right"])
    reference = {m["group_size"]: m for m in methods if m["name"] == _OURS}
    right = [answer for task in tasks for answer in source["right"][task]]
    accuracy = [["fp16", "", *(str(sum(source["right"][task])) for task in tasks), str(sum(right)), "", ""]]
    drift = []
    for method in methods:
        name, group = method["name"], str(method["group_size"])
        if "failed" in method:
            drift.append([name, group, f"failed: {method['failed']}", "", ""])
            continue
        answers = [answer for task in tasks for answer in method["right"][task]]
        lost = sum(a > b for a, b in zip(right, answers, strict=True))
        won = sum(a < b for a, b in zip(right, answers, strict=True))
        counts = [str(sum(method["right"][task])) for task in tasks]
        accuracy.append([name, group, *counts, str(sum(answers)), f"-{lost} +{won}", _p(mcnemar(lost, won))])
        ours = reference[method["group_size"]]
        compared = ""
        if method is not ours:
            pairs = zip(ours["chat_kl"], method["chat_kl"], strict=True)
            interval = mean_interval([b - a for a, b in pairs], seed=0)
            compared = f"{interval.low:+.5f} to {interval.high:+.5f}"
        drift.append([name, group, f"{method['kl']:.5f}", compared, f"{sum(method['layer_errors']):.4f}"])
    data = part["calibration"]
    lines = [
        f"The embedded model, trained, {data['samples']} calibration chats with images ({data['tokens']:,} tokens). "
        f"KL divergence from fp16 on the {source['answer_tokens']:,} tokens of {source['chats']} held-out answers, "
        f"nats a token; 95% interval of the mean difference from *{_OURS}* over chats (above 0: worse than it); sum "
        f"over layers of the relative output error on {source['error_tokens']:,} held-out tokens.",
        "",
        *_table(["method", "groups of", "KL", f"KL above {_OURS}", "sum of errors"], drift),
        "",
        f"Right answers of {source['questions']} held-out questions a task; lost and won against fp16, with the p "
        "of an exact McNemar test:",
        "",
        *_table(["method", "groups of", *(task.replace("_", " ") for task in tasks), "all", "flips", "p"], accuracy),
    ]
    return lines + _on_cpu(part["stock"])


def _devices(part: dict[str, Any]) -> list[str]:
    runs = part["runs"]
    one, two = runs["0"], runs["0,1"]
    layers = one["seconds"]["layers"] / two["seconds"]["layers"]
    same = "The files are the same, byte for byte." if part["identical"] else "**The two runs wrote different files.**"
    return [
        *_run_rows({f"--devices {name}": run for name, run in runs.items()}),
        "",
        f"Layers {layers:.2f}x, whole command {one['wall'] / two['wall']:.2f}x as fast on two. {same}",
    ]


def _backoff(part: dict[str, Any]) -> list[str]:
    rows = [["none", f"{later_layers(part['whole']):.2f}", *_peaks(part["whole"]), "", "finished"]]
    for run in part["limits"]:
        limit, notes = _gb(run["limit_bytes"]), "; ".join(run["notes"])
        if "failed" in run:
            rows.append([limit, "", "", "", notes, run["failed"]])
        else:
            rows.append([limit, f"{later_layers(run):.2f}", *_peaks(run), notes, "finished"])
    return [
        "A process that may take only so much of the GPU's memory; the 7B's width, rounding to nearest.",
        "",
        *_table(["limit", "s a layer", "peak GPU", "peak host", "notes", "end"], rows),
    ]


_SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "speed": ("Time and memory of a layer", _speed),
    "full": ("A whole 7B, from disk to disk", _full),
    "wide": ("The 72B's width", _wide),
    "cost": ("Cost against work", _cost),
    "quality": ("Quality of the embedded model", _quality),
    "devices": ("Two GPUs", _devices),
    "backoff": ("Less memory than wanted", _backoff),
}
