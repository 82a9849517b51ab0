"""report.json: written whole, read back with a message for every way in which it can be wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.report.headlines import RATES, marked
from bench.report.schema import SCHEMA_VERSION, Accuracy, Item, Load, Report, SpeedPoint, SpeedRatio
from bench.report.words import speed_sentence
from bench.roles import ROLES, Role
from toolkit.errors import BenchError

__all__ = ["FILE", "UPGRADED", "read", "render", "schema"]

FILE = "report.json"
#: Among the warnings of a report that was read from schema version 1.
UPGRADED = (
    "the report is of schema version 1: its answers were scored and judged anew, and which questions share an image "
    "is not known, so each counts by itself"
)


def render(report: Report) -> str:
    """Return the report as indented JSON."""
    return report.model_dump_json(indent=1) + "\n"


def schema() -> str:
    """Return the JSON schema (draft 2020-12) of report.json."""
    found = Report.model_json_schema(mode="serialization")
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | found, indent=2) + "\n"


def read(path: Path) -> Report:
    """Read a report from its directory or file. Those of earlier schema versions are brought up to date; one of version
    1, whose answers are scored anew, says so in its warnings.

    Raises:
        BenchError: no such report, not JSON, another schema version, or not a report.
    """
    file = path / FILE if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BenchError(
            f"{path}: no report there; expected a report directory or a {FILE} written by `qvl bench`"
        ) from error
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BenchError(f"{file}: can't be read as JSON ({error})") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise BenchError(f"{file}: not a report of `qvl bench` (no schema_version)")
    if not 1 <= version <= SCHEMA_VERSION:
        raise BenchError(
            f"{file}: schema version {version}, this qvl reads 1 to {SCHEMA_VERSION}; "
            "use the qvl that wrote it, or measure again"
        )
    try:
        if version == 1:
            data = _second(data)
        if version < 3:
            data = _third(data)
        if version < 4:
            data = _fourth(data)
        # 5 has more, and what was there before means the same.
        return Report.model_validate(data | {"schema_version": SCHEMA_VERSION})
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise BenchError(f"{file}: not a valid report of schema version {version}: {error!r}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BenchError(
            f"{file}: not a valid report: {where}: {first['msg']} ({error.error_count()} problems)"
        ) from error


def _fourth(old: dict[str, Any]) -> dict[str, Any]:
    """Bring a report of schema version 3 to 4: what was asked about are images, no longer pictures; a rate that was not
    stopped counts as kept, and has no ratios of throughput; headlines are chosen as they are now."""
    data = copy.deepcopy(old) | {"schema_version": 4}
    for part in ("accuracy", "fidelity"):
        for item in (data.get(part) or {}).get("items", ()):
            if "pictures" in item:
                item["images"] = item.pop("pictures")
    rates = [point for point in data["speed"] if point["load"]["kind"] == "open"]
    for point in rates:
        point["kept"] = not (point["stopped"] or point["unsent"])
        point["achieved_per_s"] = point["offered_per_s"] if point["kept"] else point["requests_per_s"]
    kept = {point["load"]["name"] for point in rates} - {p["load"]["name"] for p in rates if not p["kept"]}
    points = [SpeedPoint.model_validate(point) for point in data["speed"]]
    ratios = [
        SpeedRatio.model_validate(ratio)
        for ratio in data["speed_ratios"]
        if not (ratio["load"] in kept and ratio["metric"] in RATES)
    ]
    data["speed_ratios"] = [ratio.model_dump() for ratio in marked(points, ratios)]
    if data["status"] != "failed":
        data["verdict"]["speed"] = speed_sentence([SpeedRatio.model_validate(r) for r in data["speed_ratios"]])
    return data


def _third(old: dict[str, Any]) -> dict[str, Any]:
    """Bring a report of schema version 2 to 3: all its loads are closed loops."""
    data = copy.deepcopy(old) | {"schema_version": 3}
    work = data["workload"]
    work["output_tokens"] = str(work["output_tokens"])
    for point in data["speed"]:
        load = Load.in_flight(point.pop("concurrency"))
        point |= {"load": load.model_dump(), "rounds": work["rounds"], "completed": point["requests"]}
    for ratio in data["speed_ratios"]:
        ratio["load"] = Load.in_flight(ratio.pop("concurrency")).name
    return data


def _second(old: dict[str, Any]) -> dict[str, Any]:
    """Bring a report of schema version 1 to 2: score its answers and judge its tasks as it is done now."""
    from bench.questions.scoring import grade
    from bench.report import accuracy, words

    data = copy.deepcopy(old) | {"schema_version": 2, "warnings": [*old["warnings"], UPGRADED]}
    if not data["accuracy"]:
        return data
    items = []
    for item in data["accuracy"]["items"]:
        for role in ROLES:
            again = grade(item["metric"], item[role]["text"], item["answers"])
            item[role] |= {"score": again.score, "note": again.note}
        alone = {"choices": [], "cluster": f"question {item['id']}", "images": []}
        items.append(Item.model_validate(item | alone))
    pairs = [accuracy.pair(item) for item in items]
    margin = data["verdict"]["margin"]
    overall, tasks = accuracy.rows(pairs, seed=data["workload"]["seed"], margin=margin)
    cut = data["accuracy"]["cut_answers"]
    found = Accuracy(overall=overall, tasks=tasks, items=items, thumbnails={}, cut_answers=cut)
    labels: dict[Role, str] = {role: data["systems"][role]["label"] for role in ROLES}
    judged = {"accuracy": overall.verdict, "sentence": words.sentence(found, margin, labels)}
    return data | {
        "accuracy": found.model_dump(),
        "verdict": data["verdict"] | judged,
        "definitions": data["definitions"] | accuracy.DEFINITIONS,
    }
