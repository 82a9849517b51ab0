"""The version is written once, in pyproject.toml; what must repeat it is held against it."""

from __future__ import annotations

import re
import tomllib

import pytest
from typer.testing import CliRunner

import toolkit
from toolkit.cli import app
from toolkit.paths import source_root

VERSION = tomllib.loads((source_root() / "pyproject.toml").read_text())["project"]["version"]


def test_the_package_has_it() -> None:
    assert toolkit.__version__ == VERSION


def test_the_command_says_it() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"qvl {VERSION}\n")


@pytest.mark.parametrize(
    ("file", "tag"),
    [
        ("deploy/compose.yaml", r"image: qvl:(\S+)"),
        ("deploy/kubernetes/server/kustomization.yaml", r"newTag: (\S+)"),
        ("deploy/production-stack/values.yaml", r'tag: "(\S+)"'),
    ],
)
def test_images_of_deployments_are_of_this_version(file: str, tag: str) -> None:
    assert re.findall(tag, (source_root() / file).read_text()) == [VERSION]
