"""requests.csv and requests.parquet: a row for each request under load, for questions that a report does not answer."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from bench.load import metrics
from bench.load.client import Trace
from bench.run.measured import Measurements

__all__ = ["COLUMNS", "EXPORTS", "write"]

Export = Literal["csv", "parquet"]
EXPORTS: tuple[Export, ...] = ("csv", "parquet")

#: Name -> type and what it is. ``_ms`` milliseconds, ``_s`` seconds from the start of the round's measured part.
COLUMNS: dict[str, type] = {
    "system": str,
    "load": str,
    "round": int,
    "number": int,
    "shape": str,
    "ramp": bool,
    "due_s": float,
    "sent_s": float,
    "ended_s": float,
    "ttft_ms": float,
    "tpot_ms": float,
    "e2e_ms": float,
    "prompt_tokens": int,
    "images": int,
    "image_tokens": int,
    "output_tokens": int,
    "chunks": int,
    "cached_tokens": int,
    "retries": int,
    "finish_reason": str,
    "failure": str,
    "message": str,
}


def rows(measured: Measurements) -> Iterator[dict[str, Any]]:
    """Return a row for each request that was sent under load, those of ramps too; failed ones have no latencies."""

    def ms(of: Callable[[Trace], float | None], trace: Trace) -> float | None:
        value = None if trace.failure else of(trace)
        return None if value is None else round(1000.0 * value, 4)

    for (role, load), rounds in measured.stretches().items():
        for round_, stretch in sorted(rounds.items()):
            block = stretch.block
            for ramp, traces in ((True, block.ramp), (False, block.traces)):
                for trace in traces:
                    yield {
                        "system": role,
                        "load": load.name,
                        "round": round_,
                        "number": trace.number,
                        "shape": trace.shape,
                        "ramp": ramp,
                        "due_s": round(trace.scheduled - block.begun, 6),
                        "sent_s": round(trace.started - block.begun, 6),
                        "ended_s": round(trace.ended - block.begun, 6),
                        "ttft_ms": ms(metrics.ttft, trace),
                        "tpot_ms": ms(metrics.tpot, trace),
                        "e2e_ms": ms(metrics.e2e, trace),
                        "prompt_tokens": trace.prompt_tokens,
                        "images": trace.images,
                        "image_tokens": trace.image_tokens,
                        "output_tokens": trace.completion_tokens,
                        "chunks": len(trace.chunks),
                        "cached_tokens": trace.cached_tokens,
                        "retries": trace.retries,
                        "finish_reason": trace.finish_reason,
                        "failure": trace.failure.kind if trace.failure else None,
                        "message": trace.failure.message if trace.failure else None,
                    }


def write(measured: Measurements, directory: Path, kinds: tuple[Export, ...]) -> None:
    """Write ``requests.KIND`` of each kind to the directory.

    Raises:
        OSError: it can't be written.
    """
    if "csv" in kinds:
        with (directory / "requests.csv").open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(rows(measured))
    if "parquet" in kinds:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
        schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
        found = pyarrow.Table.from_pylist(list(rows(measured)), schema=schema)
        pyarrow.parquet.write_table(found, directory / "requests.parquet")
