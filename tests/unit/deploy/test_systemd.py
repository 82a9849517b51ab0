"""The systemd unit: systemd understands it, it is confined, and it has time to drain."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.deploy.conftest import DEPLOY, option, seconds, systemd_command, tool

UNIT = (DEPLOY / "systemd" / "qvl.service").read_text()


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that exists: systemd checks that too."""
    path = tmp_path / "qvl.service"
    path.write_text(re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", UNIT, flags=re.M))
    return path


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [tool("systemd-analyze"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_systemd_understands_it(unit: Path) -> None:
    done = analyze("verify", unit)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_systemd_would_say_so_if_not(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("NoNewPrivileges", "NoNewPriviliges"))
    assert "NoNewPriviliges" in analyze("verify", unit).stderr


def test_it_is_confined(unit: Path) -> None:
    """systemd's own measure, from 0 (safe) to 10. What is left is what a GPU and a network server need."""
    done = analyze("security", "--offline=true", "--threshold=20", unit)
    assert done.returncode == 0, done.stdout


def test_it_restarts_after_failures_and_gives_up_in_the_end() -> None:
    assert re.search(r"^Restart=on-failure$", UNIT, re.M)
    assert re.search(r"^StartLimitBurst=5$", UNIT, re.M)


def test_it_has_time_to_drain() -> None:
    stop = re.search(r"^TimeoutStopSec=(\S+)$", UNIT, re.M)
    assert stop is not None
    assert seconds(stop[1]) > seconds(option(systemd_command(), "--drain")) + 15


def test_keys_are_a_credential_not_a_setting() -> None:
    assert re.search(r"^LoadCredential=api-keys:/etc/qvl/api-keys$", UNIT, re.M)
    assert option(systemd_command(), "--api-key-file") == "/run/credentials/qvl.service/api-keys"
    assert not re.search(r"^\w*KEY\w*=", (DEPLOY / "systemd" / "qvl.env").read_text(), re.M)
