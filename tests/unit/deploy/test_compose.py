"""compose.yaml: valid, private, and its servers given time to drain."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.conftest import DEPLOY, load, option, seconds, serve_commands, tool

COMPOSE = load(DEPLOY / "compose.yaml")
SERVICES: dict[str, Any] = COMPOSE["services"]
SERVERS = ["qvl", "qvl-fp16"]


def check(file: Path) -> subprocess.CompletedProcess[str]:
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_it_follows_the_compose_specification() -> None:
    done = check(DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout


def test_the_check_notices_a_word_that_compose_does_not_know(tmp_path: Path) -> None:
    bad = tmp_path / "compose.yaml"
    bad.write_text("services:\n  a:\n    image: b\n    read_onyl: true\n")
    assert check(bad).returncode != 0


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_pinned_confined_and_private(name: str) -> None:
    service = SERVICES[name]
    tag = service["image"].rpartition(":")[2]
    assert tag and tag != "latest"
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
    assert service["user"].partition(":")[0] not in ("", "0", "root")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert set(service["secrets"]) <= set(COMPOSE["secrets"])
    for volume in service["volumes"]:
        source = volume.partition(":")[0]
        if source.startswith("./"):
            assert (DEPLOY / source).exists()
        elif not source.startswith("$"):
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_has_a_gpu_and_time_to_drain(name: str) -> None:
    service = SERVICES[name]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and len(device["device_ids"]) == 1
    drain = seconds(option(serve_commands()[f"compose {name}"], "--drain"))
    assert seconds(service["stop_grace_period"]) > drain + 15


def test_the_servers_differ_in_model_and_place_only() -> None:
    awq, fp16 = (SERVICES[name] for name in SERVERS)
    assert awq["command"][1:] == fp16["command"][1:] and awq["command"][0] != fp16["command"][0]
    assert "profiles" not in awq and fp16["profiles"] == ["fp16"]


def test_secrets_are_files_that_git_ignores() -> None:
    ignored = (DEPLOY / ".gitignore").read_text().split()
    assert "/secrets/" in ignored
    assert all(secret["file"].startswith("./secrets/") for secret in COMPOSE["secrets"].values())
