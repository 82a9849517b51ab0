"""Holds `qvl plan` against real boots: what vLLM reports, what was estimated, and the difference.

    python -m bench.studies capacity-check out/2b-bf16 out/2b-awq --cards 16,24 --out out/capacity.json

A card of 16 or 24 GiB is a share of the real one: ``--gpu-memory-utilization`` is scaled, and the batch sizes are those
that vLLM would choose for the smaller card. Every boot is written down at once; run again, the script goes on. On a CPU
(the dry run) the KV cache is given in bytes, so only its tokens are held against the estimate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.studies.settings import CapacitySettings
from toolkit.errors import QvlError

__all__ = ["compare", "read_log", "run"]

_GIB = 1 << 30
_PATTERNS = {
    "weights_bytes": (re.compile(r"Model loading took ([\d.]+) GiB"), _GIB),
    "kv_cache_bytes": (re.compile(r"Available KV cache memory: ([\d.]+) GiB"), _GIB),
    "kv_tokens": (re.compile(r"KV cache size: ([\d,]+) tokens"), 1),
}


def read_log(text: str) -> dict[str, int]:
    """Return what vLLM's log says of weights, KV cache and its tokens; the last of each, without what it lacks."""
    found = {}
    for name, (pattern, unit) in _PATTERNS.items():
        if matches := pattern.findall(text):
            found[name] = round(float(matches[-1].replace(",", "")) * unit)
    return found


def compare(estimated: dict[str, Any], reported: dict[str, int]) -> dict[str, float]:
    """Return, for what vLLM reported, how much more was estimated, in percent of the report."""
    return {name: round(100 * (estimated[name] / value - 1), 2) for name, value in reported.items() if value}


def check(model: str, card: int | None, context: int) -> dict[str, Any]:
    """Boot ``model`` as on a card of ``card`` bytes (None: this machine's CPU) and compare."""
    from bench.run.boot import free_ports
    from serve.plan.capacity import batch, capacity, kv_tokens
    from serve.plan.load import Load
    from serve.process import lifecycle
    from serve.settings.backend import find_gpus
    from serve.settings.config import DEFAULT_GPU_SHARE, ServerConfig
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.sources.directory import resolve

    checkpoint = Checkpoint.open(resolve(model))
    row: dict[str, Any] = {"model": Path(model).name, "card_bytes": card}
    if card is None:
        options = ServerConfig(port=free_ports(1)[0], max_model_len=context)
        given = options.kv_bytes_for(checkpoint)
        estimated = {"kv_tokens": kv_tokens(checkpoint, given, options.dtype_for(checkpoint))}
    else:
        load = Load(context=context)
        estimated = capacity(checkpoint, card, load, row["model"]).as_dict()
        row["estimated_fits"] = estimated["fits"]
        tokens, sequences = batch(card, load)
        total = find_gpus()[0].total
        options = ServerConfig(
            port=free_ports(1)[0],
            max_model_len=estimated["context"] or context,
            max_num_seqs=sequences,
            gpu_memory_utilization=DEFAULT_GPU_SHARE * card / total,
            extra=("--max-num-batched-tokens", str(tokens)),
        )
    row["estimated"] = estimated
    try:
        with lifecycle.start(model, options, attached=True) as server:
            reported = read_log(server.log.read_text(errors="replace"))
    except QvlError as error:
        return {**row, "booted": False, "why": str(error)}
    return {**row, "booted": True, "reported": reported, "difference_percent": compare(estimated, reported)}


def run(models: Sequence[str], settings: CapacitySettings) -> None:
    """Boot each model on each card and write the comparison."""
    from bench.machine.environment import gpu_names, versions
    from serve.settings.config import ServerConfig
    from toolkit.console import note

    rows: list[dict[str, Any]] = json.loads(settings.out.read_text())["boots"] if settings.out.exists() else []
    done = {(row["model"], row["card_bytes"]) for row in rows}
    cards = [int(float(size) * _GIB) for size in settings.cards.split(",")] if ServerConfig().on_gpu else [None]
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    for model in models:
        for card in cards:
            if (Path(model).name, card) in done:
                continue
            row = check(model, card, settings.context)
            rows.append(row)
            report = {"gpus": gpu_names(), "versions": versions(), "boots": rows}
            settings.out.write_text(json.dumps(report, indent=1) + "\n")
            note(f"{row['model']} on {'this CPU' if card is None else f'{card / _GIB:g} GiB'}: {_said(row)}")


def _said(row: dict[str, Any]) -> str:
    if not row["booted"]:
        expected = "as estimated" if not row.get("estimated_fits", True) else "though it was estimated to fit"
        return f"does not boot, {expected}"
    return ", ".join(f"{name} {value:+.1f}%" for name, value in row["difference_percent"].items()) or "nothing reported"
