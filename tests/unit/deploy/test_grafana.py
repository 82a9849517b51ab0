"""Grafana: the dashboard is the one that deploy/generate.py makes, whole, and provisioned where compose mounts it."""

from __future__ import annotations

import importlib.util
import itertools
import re
from typing import Any

import pytest

from tests.unit.deploy.conftest import DEPLOY, dashboard, fill, load, metrics

PANELS = [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def generated() -> dict[Any, str]:
    spec = importlib.util.spec_from_file_location("generate", DEPLOY / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["generate"] = module
    try:
        spec.loader.exec_module(module)
        files: dict[Any, str] = module.files()
    finally:
        del sys.modules["generate"]
    return files


def test_generated_files_are_up_to_date() -> None:
    for path, text in generated().items():
        assert path.read_text() == text, f"{path} is out of date: run `make deploy-files`"


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_each_panel_says_what_it_shows_and_asks_for_it(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["targets"] and len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for target in panel["targets"]:
        labels = re.findall(r"{{(\w+)}}", target["legendFormat"])
        by = re.search(r"by \(([^)]*)\)", target["expr"])
        if by is not None:  # a legend can only name labels that the query keeps
            assert set(labels) <= {label.strip() for label in by[1].split(",")}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart and one["x"] + one["w"] <= 24


def test_the_dashboard_covers_what_an_operator_asks() -> None:
    read = set().union(*(metrics(fill(target["expr"])) for panel in PANELS for target in panel["targets"]))
    assert {
        "qvl_requests_total",
        "qvl_refusals_total",
        "qvl_key_tokens_total",
        "qvl_ready",
        "qvl_restarts",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:kv_cache_usage_perc",
        "vllm:num_requests_waiting",
    } <= read
    compared = [panel for panel in PANELS if "by (variant" in panel["targets"][0]["expr"]]
    assert len(compared) >= 4


def test_variables_are_used_and_defined() -> None:
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]}
    text = (DEPLOY / "grafana" / "dashboards" / "qvl.json").read_text()
    used = set(re.findall(r"\$\{?([a-z]+)\b", text))
    assert used == defined


def test_it_is_provisioned_where_compose_mounts_it() -> None:
    grafana = load(DEPLOY / "compose.yaml")["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    (provider,) = load(DEPLOY / "grafana" / "provisioning" / "dashboards" / "qvl.yaml")["providers"]
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
    (source,) = load(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
