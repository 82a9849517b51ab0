"""Kubernetes: every manifest valid, pods confined, probes on the right routes, and time to drain."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.unit.deploy.conftest import DEPLOY, load, option, seconds, serve_commands, tool

KUBERNETES = DEPLOY / "kubernetes"
MANIFESTS = [path for path in sorted(KUBERNETES.glob("*/*.yaml")) if path.name != "kustomization.yaml"]
#: Their schemas are those of operators, not Kubernetes' own.
CUSTOM = {"PodMonitor", "PrometheusRule", "ScaledObject"}
POD: dict[str, Any] = load(KUBERNETES / "server" / "deployment.yaml")["spec"]["template"]["spec"]
CONTAINER: dict[str, Any] = POD["containers"][0]


@pytest.mark.parametrize("version", ["1.30", "1.37"])
@pytest.mark.parametrize("path", MANIFESTS, ids=[path.name for path in MANIFESTS])
def test_a_manifest_follows_the_schema(path: Path, version: str) -> None:
    manifest = load(path)
    if manifest["kind"] in CUSTOM:
        assert manifest["apiVersion"].partition("/")[0] in ("monitoring.coreos.com", "keda.sh") and manifest["spec"]
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


def test_the_check_notices_a_word_that_kubernetes_does_not_know() -> None:
    manifest = load(KUBERNETES / "server" / "deployment.yaml")
    manifest["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.37", strict=True)


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(KUBERNETES.glob("*/kustomization.yaml"))])
def test_kustomize_builds_it(name: str) -> None:
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(KUBERNETES / name)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for manifest in yaml.safe_load_all(done.stdout):
        if manifest["kind"] not in CUSTOM:
            kubernetes_validate.validate(manifest, "1.37", strict=True)
        if manifest["kind"] == "Deployment" and name in ("awq", "fp16"):
            labels = manifest["spec"]["template"]["metadata"]["labels"]
            assert labels == manifest["spec"]["selector"]["matchLabels"]
            assert labels == {"app.kubernetes.io/name": "qvl", "variant": name}


def test_every_manifest_belongs_to_a_kustomization() -> None:
    for path in MANIFESTS:
        assert path.name in load(path.parent / "kustomization.yaml")["resources"]


def test_the_pod_passes_the_restricted_standard() -> None:
    """Kubernetes' Pod Security Standards, level restricted, which the namespace enforces."""
    labels = load(KUBERNETES / "shared" / "namespace.yaml")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    outer, inner = POD["securityContext"], CONTAINER["securityContext"]
    assert outer["runAsNonRoot"] is True and outer["runAsUser"] == 2000
    assert outer["seccompProfile"]["type"] == "RuntimeDefault"
    assert inner["allowPrivilegeEscalation"] is False and inner["capabilities"] == {"drop": ["ALL"]}
    assert inner["readOnlyRootFilesystem"] is True and POD["automountServiceAccountToken"] is False
    allowed = {"persistentVolumeClaim", "secret", "emptyDir"}
    assert all(set(volume) - {"name"} <= allowed for volume in POD["volumes"])
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == {volume["name"] for volume in POD["volumes"]}


def test_probes_ask_the_right_routes() -> None:
    assert CONTAINER["startupProbe"]["httpGet"]["path"] == "/ready"
    assert CONTAINER["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/health"
    started = CONTAINER["startupProbe"]
    assert started["periodSeconds"] * started["failureThreshold"] >= 600  # --timeout's default


def test_a_pod_has_time_to_drain() -> None:
    drain = seconds(option(serve_commands()["kubernetes"], "--drain"))
    paused = float(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > paused + drain + 15


def test_keys_come_as_a_directory_so_that_they_change_without_a_restart() -> None:
    (mount,) = [mount for mount in CONTAINER["volumeMounts"] if mount["name"] == "keys"]
    assert "subPath" not in mount and mount["readOnly"] is True
    assert option(serve_commands()["kubernetes"], "--api-key-file").startswith(mount["mountPath"] + "/")


def test_the_monitor_finds_the_pods_and_names_the_job() -> None:
    monitor = load(KUBERNETES / "monitoring" / "podmonitor.yaml")["spec"]
    labels = load(KUBERNETES / "server" / "deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert labels[monitor["jobLabel"]] == "qvl"
    (endpoint,) = monitor["podMetricsEndpoints"]
    assert endpoint["port"] in {port["name"] for port in CONTAINER["ports"]}
    (keys,) = [volume["secret"] for volume in POD["volumes"] if volume["name"] == "keys"]
    assert endpoint["authorization"]["credentials"]["name"] == keys["secretName"]


def test_the_budget_the_service_and_the_scaler_mean_the_deployment() -> None:
    labels = load(KUBERNETES / "server" / "deployment.yaml")["spec"]["template"]["metadata"]["labels"]
    budget = load(KUBERNETES / "server" / "poddisruptionbudget.yaml")["spec"]
    assert budget["selector"]["matchLabels"] == labels and budget["maxUnavailable"] == 1
    assert load(KUBERNETES / "server" / "service.yaml")["spec"]["selector"] == labels
    scaler = load(KUBERNETES / "autoscaling" / "scaledobject.yaml")["spec"]
    deployment = load(KUBERNETES / "server" / "deployment.yaml")
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"], "the scaler and `kubectl apply` would undo each other's number"
    assert "vllm:num_requests_waiting" in scaler["triggers"][0]["metadata"]["query"]
