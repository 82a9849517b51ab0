"""Quantize from Python, and look at what came out.

python examples/quantize.py                                     # the embedded model, seconds on a CPU
python examples/quantize.py --model Qwen/Qwen2-VL-7B-Instruct --calib mine.jsonl --samples 128 --out 7b-awq
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from toolkit import Recipe, inspect, quantize


def main() -> None:
    """Quantize, then print what the checkpoint is and how far each layer is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="directory, hub id, or demo")
    parser.add_argument("--calib", default="demo", help="JSONL of chats, or demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("out/example-awq"))
    asked = parser.parse_args()

    recipe = Recipe(calib=asked.calib, samples=asked.samples, group_size=128)
    out = quantize(asked.model, asked.out, recipe=recipe, force=True)

    found = inspect(out)
    print(f"{out}: {found.format}, {found.nbytes / 1e6:.1f} MB of weights, broken: {found.broken}")
    for layer in json.loads((out / "qvl.json").read_text())["layers"]:
        print(f"layer {layer['layer']}: relative error {layer['relative_error']:.4f}")


if __name__ == "__main__":
    main()
