"""Values for the vLLM production-stack chart: vLLM is told what `qvl serve` would tell it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from serve.settings.arguments import middleware
from serve.settings.config import ServerConfig
from serve.settings.limits import Limits
from serve.settings.ready import ReadySettings
from tests.unit.deploy.conftest import DEPLOY, load, tool

VALUES: dict[str, Any] = load(DEPLOY / "production-stack" / "values.yaml")
ENGINES: list[dict[str, Any]] = VALUES["servingEngineSpec"]["modelSpec"]
ENVIRONMENT = {item["name"]: item["value"] for item in ENGINES[0]["env"]}
ARGUMENTS: list[str] = ENGINES[0]["vllmConfig"]["extraArgs"]


def test_they_follow_the_charts_schema() -> None:
    """The chart is not part of this project: CHART names a copy of its directory `helm`."""
    chart = os.environ.get("CHART")
    if not chart:
        pytest.skip("CHART does not name a copy of the production-stack chart")
    schema = Path(chart) / "values.schema.json"
    values = DEPLOY / "production-stack" / "values.yaml"
    done = subprocess.run(
        [tool("check-jsonschema"), "--schemafile", str(schema), str(values)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_the_guard_stands_where_qvl_serve_puts_it() -> None:
    classes = [part.partition("=")[2] for part in ARGUMENTS if part.startswith("--middleware=")]
    assert classes == middleware(ServerConfig(guard=Limits()))


def test_the_settings_can_be_read() -> None:
    limits = Limits.loads(ENVIRONMENT["QVL_GUARD"])
    assert limits.needs_key
    assert limits.max_tokens <= ENGINES[0]["vllmConfig"]["maxModelLen"], "vLLM would refuse what the guard gives"
    mounts = [mount["mountPath"] for mount in ENGINES[0]["extraVolumeMounts"]]
    assert str(Path(str(limits.api_key_file)).parent) in mounts
    settings = ReadySettings(**json.loads(ENVIRONMENT["QVL_READY"]))
    assert f"--served-model-name={settings.model}" in ARGUMENTS
    assert f"--shutdown-timeout={settings.drain:g}" in ARGUMENTS
    assert settings.drain + 5 < 30, "the chart leaves Kubernetes' grace period of 30 s"


def test_vllm_itself_asks_for_no_key() -> None:
    assert "vllmApiKey" not in VALUES["servingEngineSpec"]
    assert VALUES["routerSpec"]["vllmApiKey"]["secretName"] == "qvl-keys"


def test_variants_are_told_apart_and_probed() -> None:
    assert [engine["podLabels"]["variant"] for engine in ENGINES] == ["awq", "fp16"]
    assert all(engine["vllmConfig"] == ENGINES[0]["vllmConfig"] for engine in ENGINES)
    assert VALUES["servingEngineSpec"]["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert VALUES["servingEngineSpec"]["livenessProbe"]["httpGet"]["path"] == "/health"
    monitor = VALUES["extraObjects"][0]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= VALUES["servingEngineSpec"]["labels"].items()
    assert VALUES["servingEngineSpec"]["labels"][monitor["jobLabel"]] == "qvl"
