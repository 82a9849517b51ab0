"""The model card and the versions that go beside a quantized checkpoint."""

from __future__ import annotations

import contextlib
import json
import platform
from importlib import metadata
from typing import Any

from toolkit.checkpoint.layouts import LAYOUTS
from toolkit.version import __version__

__all__ = ["model_card", "versions"]


def versions() -> dict[str, str]:
    """Return the versions of all that a quantization's result can depend on."""
    found = {"qvl": __version__, "python": platform.python_version()}
    for package in ("autoawq", "torch", "transformers", "safetensors", "qwen-vl-utils"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def model_card(manifest: dict[str, Any], model_type: str) -> str:
    """Write a model card from qvl.json: what was done, with what; ``model_type`` is config.json's."""
    recipe, calibration, source = manifest["recipe"], manifest["calibration"], manifest["source"]
    errors = [layer["relative_error"] for layer in manifest["layers"]]
    worst = max(manifest["layers"], key=lambda layer: layer["relative_error"])
    layout = LAYOUTS[recipe["format"]]
    name = source["model"] + (f" + {source['adapter']}" if source["adapter"] else "")
    rows = {
        "source": f"{name}, content hash `{source['hash']}`",
        "calibration": f"{calibration['samples']} samples, {calibration['tokens']} tokens "
        f"({calibration['vision_tokens']} of images and videos)",
        "search": _search(recipe),
        "relative output error of a layer": f"mean {sum(errors) / len(errors):.4f}, "
        f"worst {worst['relative_error']:.4f} (layer {worst['layer']})",
        "versions": ", ".join(f"{k} {v}" for k, v in manifest["versions"].items()),
    }
    others = ["the vision tower", "embeddings", "output head"]
    packed = []
    if manifest["vision"]:
        packed.append(f"{sum(len(stage['choices']) for stage in manifest['vision'])} linears of the vision tower")
        others.remove("the vision tower")
    if manifest["lm_head"]:
        packed.append("the output head")
        others.remove("output head")
        rows["relative error of logits"] = f"{manifest['lm_head']['relative_error']:.4f}"
    are = "are" if manifest["vision"] else "is"
    tower = f"so {are} {' and '.join(packed)}; " if packed else ""
    tower += f"{', '.join(others[:-1])}{' and ' * (len(others) > 1)}{others[-1]} are the source's"
    left = f", and so are the linears of {manifest['left_in_16_bits']}" if manifest["left_in_16_bits"] else ""
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
base_model: {json.dumps(source["model"])}
library_name: transformers
pipeline_tag: image-text-to-text
tags: [{layout.method}, 4-bit, {model_type}]
---

# {name}, AWQ 4 bits

Quantized by qvl {__version__}. The language layers are 4-bit AWQ ({layout.title.removeprefix("AWQ ")}, group size
{recipe["group_size"]}, zero points); {tower}{left}.

| | |
|---|---|
{table}

`qvl.json` has all of it, layer by layer; `qvl-run.json` has what it cost. Serve it with `qvl serve DIR`, measure it
against its source with `qvl bench --baseline SOURCE --candidate DIR --out REPORT`.
"""


def _search(recipe: dict[str, Any]) -> str:
    clip = f"clip {'on' if recipe['clip'] else 'off'}"
    if recipe["search"] == "autoawq":
        return f"AutoAWQ's, {recipe['scaling']} scaling, {clip}"
    balance = ", tokens balanced by modality" if recipe["balance"] == "modality" else ""
    distilled = ", distilled" if recipe.get("distill") else ""
    effort = f"{recipe['effort']} effort, " if recipe["effort"] != "fast" else ""
    scales = ", no scales" if recipe["scaling"] == "none" else ""
    return f"second moments, {effort}{clip}{scales}, rounding {recipe['rounding']}{balance}{distilled}"
