"""Compare settings: quantize with several group sizes and roundings; print size, error and seconds of each.

    python examples/compare_settings.py
    python examples/compare_settings.py --model Qwen/Qwen2-VL-2B-Instruct --calib mine.jsonl --samples 128

The error is of each layer's output on tokens that the search has not seen, relative to the output; their sum is shown.
It ranks settings cheaply. What they cost in answers, `qvl bench` says.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from toolkit import Recipe, inspect, quantize

SETTINGS = {
    "groups of 128, rounded to nearest": Recipe(rounding="nearest"),
    "groups of 128, compensated": Recipe(),
    "groups of 64, compensated": Recipe(group_size=64),
}


def main() -> None:
    """Quantize once for each of `SETTINGS`, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calib", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("out/example-settings"))
    asked = parser.parse_args()

    print("| settings | weights, MB | error, all layers | seconds |")
    print("|---|---|---|---|")
    for number, (name, recipe) in enumerate(SETTINGS.items()):
        began = time.monotonic()
        recipe = recipe.replaced(calib=asked.calib, samples=asked.samples)
        out = quantize(asked.model, asked.out / str(number), recipe=recipe, force=True)
        layers = json.loads((out / "qvl.json").read_text())["layers"]
        error = sum(layer["relative_error"] for layer in layers)
        size = inspect(out).nbytes / 1e6
        print(f"| {name} | {size:.2f} | {error:.4f} | {time.monotonic() - began:.0f} |")


if __name__ == "__main__":
    main()
