"""Write the files of deploy/ that say at length what is said here or in prometheus/alerts.yml: `make deploy-files`.

They are Grafana's dashboard and the alerts as prometheus-operator wants them. Both are committed, since they are what
is deployed; tests/unit/deploy checks that they are up to date.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
DASHBOARD = HERE / "grafana" / "dashboards" / "qvl.json"
RULES = HERE / "kubernetes" / "monitoring" / "prometheusrule.yaml"

#: Selects the servers that the dashboard's variables name.
_WHERE = 'job="qvl", instance=~"$instance"'
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH = 24


@dataclass(frozen=True)
class Panel:
    """One panel: a title, what it says to someone who never saw it, and its queries (PromQL, legend)."""

    title: str
    description: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    #: (value, colour) from which a colour holds; None for the lowest.
    thresholds: tuple[tuple[float | None, str], ...] = ((None, "green"),)
    highest: float | None = None


def _rate(metric: str, by: str, where: str = _WHERE) -> str:
    return f"sum by ({by}) (rate({metric}{{{where}}}[$__rate_interval]))"


def _quantile(q: float, histogram: str, by: str = "instance", where: str = _WHERE) -> str:
    return f"histogram_quantile({q:g}, {_rate(f'{histogram}_bucket', f'{by}, le', where)})"


def _quantiles(histogram: str, where: str = _WHERE) -> tuple[tuple[str, str], ...]:
    return tuple((_quantile(q, histogram, where=where), f"p{q * 100:.0f} {{{{instance}}}}") for q in (0.5, 0.95, 0.99))


def _share(part: str, whole: str, by: str = "instance") -> str:
    return f"{_rate(part, by)} / ({_rate(whole, by)} > 0)"


#: What clients ask for; /health, /ready and /metrics are polled by machines.
_ASKED = f'{_WHERE}, route!~"/health|/ready|/metrics"'
_ERRORS = (
    f'(sum(rate(qvl_requests_total{{{_ASKED}, status=~"5.."}}[$__rate_interval])) or vector(0))'
    f" / sum(rate(qvl_requests_total{{{_ASKED}}}[$__rate_interval]))"
)
_REFUSED = f"{_rate('qvl_refusals_total', 'instance')} / ({_rate('qvl_requests_total', 'instance', _ASKED)} > 0)"
_BOTH = 'job="qvl"'

ROWS: dict[str, tuple[Panel, ...]] = {
    "Now": (
        Panel(
            "Servers ready",
            "Servers whose last question about an image was answered. 0: nobody is served.",
            ((f"sum(qvl_ready{{{_WHERE}}})", "ready"),),
            kind="stat",
            width=4,
            thresholds=((None, "red"), (1, "green")),
        ),
        Panel(
            "Requests a second",
            "All that clients asked for, refused or not.",
            ((f"sum(rate(qvl_requests_total{{{_ASKED}}}[$__rate_interval]))", "requests"),),
            unit="reqps",
            kind="stat",
            width=4,
        ),
        Panel(
            "Server errors",
            "Share of answers with a status of 500 or more.",
            ((_ERRORS, "errors"),),
            unit="percentunit",
            kind="stat",
            width=4,
            thresholds=((None, "green"), (0.005, "orange"), (0.02, "red")),
        ),
        Panel(
            "Time to first token, p95",
            "From a request's arrival at the engine to its first token.",
            ((_quantile(0.95, "vllm:time_to_first_token_seconds", "job"), "p95"),),
            unit="s",
            kind="stat",
            width=4,
            thresholds=((None, "green"), (2, "orange"), (5, "red")),
        ),
        Panel(
            "Waiting",
            "Requests that wait for room in a batch.",
            ((f"sum(vllm:num_requests_waiting{{{_WHERE}}})", "waiting"),),
            kind="stat",
            width=4,
            thresholds=((None, "green"), (4, "orange"), (8, "red")),
        ),
        Panel(
            "KV cache",
            "Share of the KV cache in use on the fullest server.",
            ((f"max(vllm:kv_cache_usage_perc{{{_WHERE}}})", "used"),),
            unit="percentunit",
            kind="stat",
            width=4,
            thresholds=((None, "green"), (0.85, "orange"), (0.95, "red")),
            highest=1,
        ),
    ),
    "Load": (
        Panel(
            "Requests by status",
            "Answers a second by HTTP status. 4xx are refusals, 5xx are ours to mend.",
            ((_rate("qvl_requests_total", "status", _ASKED), "{{status}}"),),
            unit="reqps",
            stacked=True,
        ),
        Panel(
            "Requests by route",
            "Where requests go. Routes that are not ours count as other.",
            ((_rate("qvl_requests_total", "route"), "{{route}}"),),
            unit="reqps",
            stacked=True,
        ),
        Panel(
            "Tokens a second",
            "Prompt tokens (images included) and output tokens.",
            (
                (_rate("vllm:prompt_tokens_total", "instance"), "prompt {{instance}}"),
                (_rate("vllm:generation_tokens_total", "instance"), "output {{instance}}"),
            ),
        ),
    ),
    "Latency": (
        Panel(
            "Time to first token (TTFT)",
            "Queue, image encoding and prefill. Grows with the queue.",
            _quantiles("vllm:time_to_first_token_seconds"),
            unit="s",
        ),
        Panel(
            "Time per output token (TPOT)",
            "Per request: (end to end - first token) / (output tokens - 1).",
            _quantiles("vllm:request_time_per_output_token_seconds"),
            unit="s",
        ),
        Panel(
            "End to end",
            "From a request's arrival to its last token.",
            _quantiles("vllm:e2e_request_latency_seconds"),
            unit="s",
        ),
    ),
    "Queue and cache": (
        Panel(
            "In flight, running, waiting",
            "In flight: accepted by the guard. Running: in a batch. Waiting: for room in one.",
            (
                (f"sum by (instance) (qvl_in_flight{{{_WHERE}}})", "in flight {{instance}}"),
                (f"sum by (instance) (vllm:num_requests_running{{{_WHERE}}})", "running {{instance}}"),
                (f"sum by (instance) (vllm:num_requests_waiting{{{_WHERE}}})", "waiting {{instance}}"),
            ),
        ),
        Panel(
            "Time in the queue",
            "Part of the time to the first token.",
            _quantiles("vllm:request_queue_time_seconds"),
            unit="s",
        ),
        Panel(
            "KV cache in use",
            "At 100 % running requests are thrown out and computed again later.",
            ((f"max by (instance) (vllm:kv_cache_usage_perc{{{_WHERE}}})", "{{instance}}"),),
            unit="percentunit",
            highest=1,
        ),
        Panel(
            "Preemptions",
            "Requests thrown out of a full KV cache, a second.",
            ((_rate("vllm:num_preemptions_total", "instance"), "{{instance}}"),),
        ),
        Panel(
            "Prefix cache hits",
            "Share of prompt tokens whose keys and values were still there.",
            ((_share("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"), "{{instance}}"),),
            unit="percentunit",
            highest=1,
        ),
        Panel(
            "Image cache hits",
            "Share of images that were already prepared.",
            ((_share("vllm:mm_cache_hits_total", "vllm:mm_cache_queries_total"), "{{instance}}"),),
            unit="percentunit",
            highest=1,
        ),
    ),
    "Refusals": (
        Panel(
            "Refusals by reason",
            "Requests that the guard refused, a second. docs/operating/runbook.md says what each reason means.",
            ((_rate("qvl_refusals_total", "reason"), "{{reason}}"),),
            unit="reqps",
            width=16,
            stacked=True,
        ),
        Panel(
            "Share refused",
            "Refusals among what clients asked for.",
            ((_REFUSED, "{{instance}}"),),
            unit="percentunit",
            highest=1,
        ),
    ),
    "Clients": (
        Panel(
            "Requests by key",
            "Requests that reached the engine, a second, by the key's name in the key file.",
            ((_rate("qvl_key_requests_total", "key"), "{{key}}"),),
            unit="reqps",
            width=12,
            stacked=True,
        ),
        Panel(
            "Tokens by key",
            "Tokens of prompts and answers, a second, by the key's name in the key file.",
            ((_rate("qvl_key_tokens_total", "key, kind"), "{{key}} {{kind}}"),),
            width=12,
            stacked=True,
        ),
    ),
    "Health": (
        Panel(
            "Ready",
            "1: the last question about an image was answered in time.",
            ((f"qvl_ready{{{_WHERE}}}", "{{instance}}"),),
            kind="state-timeline",
            thresholds=((None, "red"), (1, "green")),
        ),
        Panel(
            "Draining",
            "1: it was told to end and finishes what it has.",
            ((f"qvl_draining{{{_WHERE}}}", "{{instance}}"),),
            kind="state-timeline",
            thresholds=((None, "green"), (1, "orange")),
        ),
        Panel(
            "Restarts",
            "Starts within the last hour, and how often qvl's supervisor has done it since the command was given.",
            (
                (f"changes(process_start_time_seconds{{{_WHERE}}}[1h])", "starts {{instance}}"),
                (f"qvl_restarts{{{_WHERE}}}", "by the supervisor {{instance}}"),
            ),
        ),
        Panel(
            "Start",
            "Seconds from the command to the first answer, of the process that runs now.",
            ((f"qvl_start_seconds{{{_WHERE}}}", "{{instance}}"),),
            unit="s",
        ),
        Panel(
            "Probe",
            "Seconds the server's own question about an image took. Not asked while real answers come.",
            ((_quantile(0.95, "qvl_probe_seconds"), "p95 {{instance}}"),),
            unit="s",
        ),
        Panel(
            "Probe failures",
            "Own questions without a right answer in time, in 5 minutes.",
            ((f"increase(qvl_probe_failures_total{{{_WHERE}}}[5m])", "{{instance}}"),),
        ),
        Panel(
            "Memory of the host",
            "What the server's processes hold for themselves, by kind. A slope over hours is a leak.",
            ((f"qvl_host_memory_bytes{{{_WHERE}}}", "{{process}} {{instance}}"),),
            unit="bytes",
            width=12,
        ),
        Panel(
            "Memory of the GPUs",
            "In use, by this server or (of card) by all on the card. Flat after the start.",
            ((f"qvl_gpu_memory_bytes{{{_WHERE}}}", "{{gpu}} of {{of}} {{instance}}"),),
            unit="bytes",
            width=12,
        ),
    ),
    "AWQ beside fp16": (
        Panel(
            "Time to first token, p50",
            "By variant. Compare at the same load only.",
            ((_quantile(0.5, "vllm:time_to_first_token_seconds", "variant", _BOTH), "{{variant}}"),),
            unit="s",
            width=6,
        ),
        Panel(
            "Time per output token, p50",
            "By variant. Compare at the same load only.",
            ((_quantile(0.5, "vllm:request_time_per_output_token_seconds", "variant", _BOTH), "{{variant}}"),),
            unit="s",
            width=6,
        ),
        Panel(
            "Output tokens a second",
            "By variant, over all of its servers.",
            ((_rate("vllm:generation_tokens_total", "variant", _BOTH), "{{variant}}"),),
            width=6,
        ),
        Panel(
            "Running and waiting",
            "By variant, over all of its servers.",
            (
                (f"sum by (variant) (vllm:num_requests_running{{{_BOTH}}})", "running {{variant}}"),
                (f"sum by (variant) (vllm:num_requests_waiting{{{_BOTH}}})", "waiting {{variant}}"),
            ),
            width=6,
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    ids = count(1)
    top = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "id": next(ids),
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": _WIDTH, "x": 0, "y": top},
                "panels": [],
            }
        )
        top += 1
        left = 0
        for panel in row:
            height = 4 if panel.kind == "stat" else 8
            if left + panel.width > _WIDTH:
                top, left = top + height, 0
            place = {"h": height, "w": panel.width, "x": left, "y": top}
            panels.append({"id": next(ids), **_panel(panel), "gridPos": place})
            left += panel.width
        top += height
    return {
        "uid": "qvl",
        "title": "qvl",
        "description": "Qwen2-VL served by qvl: load, latency, cache, queue, refusals, health, AWQ beside fp16.",
        "tags": ["qvl", "vllm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": _variables()},
        "annotations": {"list": [_alerts_as_annotations()]},
        "panels": panels,
    }


def _panel(panel: Panel) -> dict[str, Any]:
    custom: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        custom = {"lineWidth": 1, "fillOpacity": 15 if panel.stacked else 0, "showPoints": "never"}
        custom["stacking"] = {"mode": "normal" if panel.stacked else "none", "group": "A"}
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind == "stat":
        calculated = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        options = {"reduceOptions": calculated, "colorMode": "value", "graphMode": "area", "textMode": "value"}
    elif panel.kind == "state-timeline":
        options = {"mergeValues": True, "showValue": "never", "legend": {"showLegend": False}}
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "custom": custom,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {"mode": "absolute", "steps": [{"value": v, "color": c} for v, c in panel.thresholds]},
    }
    if panel.highest is not None:
        defaults["max"] = panel.highest
    targets = [
        {"refId": chr(ord("A") + i), "datasource": _SOURCE, "expr": query, "legendFormat": legend, "range": True}
        for i, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def _variables() -> list[dict[str, Any]]:
    asked = {
        "variant": ('label_values(up{job="qvl"}, variant)', "Variant"),
        "model": ('label_values(vllm:num_requests_running{job="qvl", variant=~"$variant"}, model_name)', "Model"),
        "instance": (
            'label_values(vllm:num_requests_running{job="qvl", variant=~"$variant", model_name=~"$model"}, instance)',
            "Server",
        ),
    }
    everything = {"text": "All", "value": "$__all"}
    source = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "refresh": 1,
    }
    return [source] + [
        {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": _SOURCE,
            "query": {"query": query, "refId": name},
            "definition": query,
            "refresh": 2,
            "includeAll": True,
            "multi": True,
            "allValue": ".*",
            "current": everything,
            "sort": 1,
        }
        for name, (query, label) in asked.items()
    ]


def _alerts_as_annotations() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "datasource": _SOURCE,
        "enable": True,
        "iconColor": "red",
        "expr": 'ALERTS{alertname=~"Qvl.*", alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}}",
    }


def rules() -> dict[str, Any]:
    """Return prometheus/alerts.yml as a PrometheusRule of prometheus-operator."""
    groups = yaml.safe_load((HERE / "prometheus" / "alerts.yml").read_text())["groups"]
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "qvl", "labels": {"app.kubernetes.io/name": "qvl"}},
        "spec": {"groups": groups},
    }


def files() -> dict[Path, str]:
    """Return each generated file and its text."""
    head = "# Made by deploy/generate.py from prometheus/alerts.yml.\n---\n"
    text: str = yaml.safe_dump(rules(), sort_keys=False, width=110)
    return {DASHBOARD: json.dumps(dashboard(), indent=1) + "\n", RULES: head + text}


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content)
