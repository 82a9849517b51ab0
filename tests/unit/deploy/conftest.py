"""What the tests of deploy/ share: where things are, the commands in them, the metrics that a server has."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"

#: Metrics that a server of one process has on /metrics before its first request, with the suffixes of their samples.
#: tests/e2e/test_deploy.py holds this list against a real server.
AT_REST = frozenset(
    {
        "process_start_time_seconds",
        "qvl_draining",
        "qvl_host_memory_bytes",
        "qvl_in_flight",
        "qvl_probe_failures_total",
        "qvl_probe_seconds_bucket",
        "qvl_ready",
        "qvl_restarts",
        "qvl_start_seconds",
        "vllm:e2e_request_latency_seconds_bucket",
        "vllm:generation_tokens_total",
        "vllm:kv_cache_usage_perc",
        "vllm:mm_cache_hits_total",
        "vllm:mm_cache_queries_total",
        "vllm:num_preemptions_total",
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:prefix_cache_hits_total",
        "vllm:prefix_cache_queries_total",
        "vllm:prompt_tokens_total",
        "vllm:request_queue_time_seconds_bucket",
        "vllm:request_time_per_output_token_seconds_bucket",
        "vllm:time_to_first_token_seconds_bucket",
    }
)
#: Those that appear with the first request, and the first refusal.
UNDER_LOAD = frozenset({"qvl_key_requests_total", "qvl_key_tokens_total", "qvl_requests_total", "qvl_refusals_total"})
#: Those of a server on a GPU.
ON_GPU = frozenset({"qvl_gpu_memory_bytes"})
#: Those that Prometheus itself makes.
OF_PROMETHEUS = frozenset({"up", "ALERTS"})


def tool(name: str) -> str:
    """The path of a program, from the virtual environment or the system; the test is skipped without it."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def load(path: Path) -> Any:
    """The only document of a YAML file."""
    return yaml.safe_load(path.read_text())


def alert_rules() -> list[dict[str, Any]]:
    """All alert rules."""
    return [rule for group in load(DEPLOY / "prometheus" / "alerts.yml")["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """The dashboard as committed."""
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "qvl.json").read_text())
    return found


def fill(query: str) -> str:
    """A dashboard's query with its variables replaced as Grafana does."""
    return re.sub(r"\$(variant|model|instance)\b", ".*", query.replace("$__rate_interval", "5m"))


def panel_queries() -> list[str]:
    """The queries of all panels."""
    panels = dashboard()["panels"]
    return [fill(target["expr"]) for panel in panels for target in panel.get("targets", ())]


def scaling_queries() -> list[str]:
    """The queries that replicas are scaled by."""
    objects = [load(DEPLOY / "kubernetes" / "autoscaling" / "scaledobject.yaml")]
    objects += load(DEPLOY / "production-stack" / "values.yaml")["extraObjects"]
    found = [trigger["metadata"]["query"] for each in objects for trigger in each["spec"].get("triggers", ())]
    assert len(found) == 4
    return found


def metrics(query: str) -> set[str]:
    """The names of the metrics that a PromQL expression reads. Raises ValueError for one that does not parse."""

    def names(node: Any) -> set[str]:
        if isinstance(node, promql_parser.VectorSelector):
            return {node.name}
        if isinstance(node, promql_parser.MatrixSelector):
            return names(node.vector_selector)
        found: set[str] = set()
        for part in ("lhs", "rhs", "expr", "param"):
            found |= names(getattr(node, part)) if getattr(node, part, None) is not None else set()
        for argument in getattr(node, "args", None) or ():
            found |= names(argument)
        return found

    return names(promql_parser.parse(query))


def serve_commands() -> dict[str, list[str]]:
    """The arguments of every `qvl serve` in deploy/, by where it stands."""
    services = load(DEPLOY / "compose.yaml")["services"]
    found = {f"compose {name}": services[name]["command"] for name in ("qvl", "qvl-fp16")}
    pod = load(DEPLOY / "kubernetes" / "server" / "deployment.yaml")["spec"]["template"]["spec"]
    found["kubernetes"] = pod["containers"][0]["args"]
    found["systemd"] = systemd_command()
    comment = re.search(r"^# +qvl (/models/.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    assert comment is not None
    found["Dockerfile"] = comment[1].split()
    return {where: [str(part) for part in command] for where, command in found.items()}


def systemd_command() -> list[str]:
    """The arguments after `qvl serve` in the unit, its variables filled in from qvl.env."""
    unit = (DEPLOY / "systemd" / "qvl.service").read_text()
    line = re.search(r"^ExecStart=\S+ serve (.*)$", unit, re.M)
    assert line is not None
    settings = re.findall(r"^(\w+)=(.*)$", (DEPLOY / "systemd" / "qvl.env").read_text(), re.M)
    text = line[1].replace("%d", "/run/credentials/qvl.service")
    for name, value in settings:
        text = re.sub(rf"\$\{{{name}\}}|\${name}\b", lambda _, value=value: value, text)
    assert "$" not in text
    return shlex.split(text)


def option(command: list[str], name: str) -> str:
    """The value of an option, given as --name=value or --name value."""
    for i, part in enumerate(command):
        if part == name:
            return command[i + 1]
        if part.startswith(f"{name}="):
            return part.partition("=")[2]
    raise AssertionError(f"{name} is not in {command}")


def seconds(duration: str) -> float:
    """A duration such as 30s, 15m or 1.5."""
    number, unit = re.fullmatch(r"([\d.]+)(s|m|min)?", duration).groups()  # type: ignore[union-attr]
    return float(number) * (60 if unit in ("m", "min") else 1)
