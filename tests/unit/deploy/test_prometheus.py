"""Prometheus: the configuration loads, each alert fires when it should, names metrics that exist and a runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from serve.settings.limits import REASONS
from tests.unit.deploy.conftest import (
    AT_REST,
    DEPLOY,
    OF_PROMETHEUS,
    ON_GPU,
    ROOT,
    UNDER_LOAD,
    alert_rules,
    load,
    metrics,
    panel_queries,
    scaling_queries,
    tool,
)

RUNBOOK = ROOT / "docs" / "operating" / "runbook.md"
PROMETHEUS = DEPLOY / "prometheus"
ALERTS = [rule["alert"] for rule in alert_rules()]


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([tool("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    key = tmp_path / "metrics-key"
    key.write_text("secret")
    text = (PROMETHEUS / "prometheus.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets/metrics-key", str(key)))
    (tmp_path / "alerts.yml").write_text((PROMETHEUS / "alerts.yml").read_text())
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", PROMETHEUS / "alerts_test.yml")


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_fires_in_a_test(alert: str) -> None:
    assert f'alertname="{alert}"' in (PROMETHEUS / "alerts_test.yml").read_text()


def test_without_its_server_a_test_of_the_rules_fails(tmp_path: Path) -> None:
    """The tests of the rules can fail."""
    (tmp_path / "alerts.yml").write_text((PROMETHEUS / "alerts.yml").read_text().replace("> 0.02", "> 0.9"))
    (tmp_path / "alerts_test.yml").write_text((PROMETHEUS / "alerts_test.yml").read_text())
    done = subprocess.run(
        [tool("promtool"), "test", "rules", str(tmp_path / "alerts_test.yml")], capture_output=True, timeout=60
    )
    assert done.returncode != 0


@pytest.mark.parametrize("rule", alert_rules(), ids=ALERTS)
def test_each_alert_says_what_a_woken_person_needs(rule: dict[str, dict[str, str]]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["annotations"]["summary"] and rule["annotations"]["description"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    text = (ROOT / page).read_text()
    section = re.search(rf"^### {rule['alert']}$(.*?)(?=^##|\Z)", text, re.M | re.S)
    assert anchor == str(rule["alert"]).lower() and section is not None, "the runbook has no such section"
    for part in ("**Means**", "**Clients see**", "**Look**", "**Do**", "**Escalate**"):
        assert part in section[1], f"the runbook does not say {part}"


def test_the_runbook_has_no_section_for_an_alert_that_is_gone() -> None:
    assert sorted(re.findall(r"^### (Qvl\w+)$", RUNBOOK.read_text(), re.M)) == sorted(ALERTS)


@pytest.mark.parametrize("query", [*panel_queries(), *(rule["expr"] for rule in alert_rules()), *scaling_queries()])
def test_queries_read_metrics_that_exist(query: str) -> None:
    names = metrics(query)
    assert names and names <= AT_REST | UNDER_LOAD | ON_GPU | OF_PROMETHEUS


def test_a_query_that_does_not_parse_is_noticed() -> None:
    with pytest.raises(ValueError):
        metrics("sum by (instance) rate(x[5m])")
    assert metrics('a{b="c"} / on (x) rate(d[5m] offset 1h) unless (e > bool 2)') == {"a", "d", "e"}


def test_reasons_of_refusal_are_the_guards() -> None:
    named = re.findall(r'reason=~?"([^"]+)"', (PROMETHEUS / "alerts.yml").read_text())
    assert named and {reason for alternatives in named for reason in alternatives.split("|")} <= set(REASONS)


def test_the_runbook_explains_every_reason() -> None:
    text = RUNBOOK.read_text()
    table = text[text.index("| reason of a refusal") : text.index("## Alerts")]
    assert set(REASONS) <= set(re.findall(r"`(\w+)`", table))


def test_prometheus_scrapes_with_a_key_from_a_file() -> None:
    jobs = load(PROMETHEUS / "prometheus.yml")["scrape_configs"]
    (job,) = [job for job in jobs if job["job_name"] == "qvl"]
    secrets = load(DEPLOY / "compose.yaml")["services"]["prometheus"]["secrets"]
    assert job["authorization"] == {"credentials_file": f"/run/secrets/{secrets[0]}"}
    assert job["static_configs"][0]["targets"] == ["qvl:8000"]
    assert job["dns_sd_configs"][0]["names"] == ["qvl-fp16"]


def test_the_operators_rules_are_the_same() -> None:
    rule = load(DEPLOY / "kubernetes" / "monitoring" / "prometheusrule.yaml")
    assert rule["spec"] == yaml.safe_load((PROMETHEUS / "alerts.yml").read_text()), "run `make deploy-files`"
