"""The layers' report: what quantizing costs each decoder layer, as JSON for `--from-report` and as an image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from toolkit.console import note
from toolkit.errors import CheckpointError

__all__ = ["write_report"]

_SIGNAL = "|y_q - y|^2 / |y - x|^2 on tokens kept out of the search: x a decoder layer's input, y its true output"
_KL = "KL(source || source with the unit quantized, by ours), nats a token of calibration answers"
#: Ways of quantizing, how they are called, and how they are drawn: told apart by dash and marker too.
_WAYS = {
    "rtn": ("round to nearest", "tab:gray", ":", "s"),
    "autoawq": ("AutoAWQ's search", "tab:orange", "--", "^"),
    "moments": ("second moments", "tab:blue", "-", "o"),
}
_WORST = 3


def write_report(
    path: Path,
    records: Sequence[dict[str, Any]],
    manifest: dict[str, Any],
    units: Sequence[str],
    costs: Mapping[tuple[int, str], float],
) -> None:
    """Write the errors of a run with ``report`` to ``path``, a plot beside it, and name the worst layers.

    Args:
        path: the JSON file; the plot has the same name with ``.png``.
        records: of all layers, with ``errors`` by way and unit.
        manifest: qvl.json, which says of what.
        units: of a layer, by name, in the order in which they are told.
        costs: by layer and unit, the KL divergence that the unit alone brings; empty where it was not measured.

    Raises:
        CheckpointError: it can't be written.
    """
    ways = [way for way in _WAYS if way in records[0]["errors"]]
    layers = [
        {
            "layer": record["layer"],
            "error": {way: record["errors"][way]["layer"] for way in ways},
            "units": {
                unit: {
                    "error": {way: record["errors"][way][unit] for way in ways},
                    **({"kl": costs[record["layer"], unit]} if costs else {}),
                }
                for unit in units
                if unit in record["errors"][ways[-1]]
            },
        }
        for record in records
    ]
    report = {
        "signal": _SIGNAL,
        "kl": _KL if costs else None,
        "group_size": manifest["recipe"]["group_size"],
        "source": manifest["source"],
        "recipe": manifest["recipe"],
        "sums": {way: sum(layer["error"][way] for layer in layers) for way in ways},
        "layers": layers,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        _draw(path.with_suffix(".png"), layers, ways, units, manifest)
    except OSError as error:
        raise CheckpointError(f"{path} can't be written: {error.strerror or error}") from error
    worst = sorted(layers, key=lambda layer: layer["error"]["moments"], reverse=True)[:_WORST]
    told = []
    for layer in worst:
        unit = max(layer["units"], key=lambda name: layer["units"][name]["error"]["moments"])
        told.append(f"{layer['layer']} ({layer['error']['moments']:.4f}, most of it {unit})")
    note(f"worst layers: {'; '.join(told)}. All are in {path} and {path.with_suffix('.png').name}")


def _height(unit: dict[str, Any] | None, measured: bool) -> float:
    """Return how high a unit's bar is: what it costs in KL, or its error where that was not measured."""
    if unit is None:
        return 0.0
    return float(unit["kl"] if measured else unit["error"]["moments"])


def _draw(
    path: Path,
    layers: Sequence[dict[str, Any]],
    ways: Sequence[str],
    units: Sequence[str],
    manifest: dict[str, Any],
) -> None:
    """Draw the error of each layer by way, and of its units by ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    where = [layer["layer"] for layer in layers]
    for way in ways:
        name, colour, dash, marker = _WAYS[way]
        left.plot(where, [x["error"][way] for x in layers], dash, marker=marker, color=colour, label=name, markersize=4)
    left.set_title("whole layer")
    left.set_ylabel("relative squared error of the output")
    below = [0.0] * len(layers)
    measured = all("kl" in unit for layer in layers for unit in layer["units"].values())
    for unit, hatch in zip(units, cycle(("", "//", "..", "xx")), strict=False):
        heights = [_height(layer["units"].get(unit), measured) for layer in layers]
        right.bar(where, heights, bottom=below, label=unit, hatch=hatch, edgecolor="white", linewidth=0.5)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    right.set_title("each unit alone, second moments: KL" if measured else "each unit alone, second moments: error")
    right.set_ylabel("nats a token" if measured else "")
    for axes in (left, right):
        axes.set_xlabel("decoder layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
    figure.suptitle(f"{manifest['source']['model']}, group size {manifest['recipe']['group_size']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
