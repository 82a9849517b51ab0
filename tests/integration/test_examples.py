"""examples/: each script and notebook runs as it is on the embedded model (ask.py: tests/e2e/test_clients.py)."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.fake_server import Behaviour, serving
from tests.support.paths import ROOT
from tests.support.short import short_demo

EXAMPLES = ROOT / "examples"
#: Put into the kernel's own working directory, so that `out/` is no part of the checkout.
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


def script(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, at: Path) -> None:
    """Run a script in this process, where torch is imported already."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.chdir(at)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.slow
def test_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script("quantize.py", "--samples", "4", monkeypatch=monkeypatch, at=tmp_path)
    shown = capsys.readouterr().out
    assert shown.startswith("out/example-awq: AWQ GEMM, ") and "broken: False" in shown
    assert re.findall(r"^layer (\d): relative error 0\.\d{4}$", shown, re.MULTILINE) == list("01234")


@pytest.mark.slow
def test_own_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script("calibration.py", monkeypatch=monkeypatch, at=tmp_path)
    shown = re.search(r"^8 samples, (\d+) tokens, (\d+) of them of images$", capsys.readouterr().out, re.MULTILINE)
    assert shown is not None and 0 < int(shown[2]) < int(shown[1])
    assert len((tmp_path / "out/example-calibrated.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = short_demo(tmp_path / "model", layers=2, halved=True)
    script("compare_settings.py", "--model", str(model), "--samples", "4", monkeypatch=monkeypatch, at=tmp_path)
    rows = re.findall(r"^\| (groups.*?) \| ([\d.]+) \| ([\d.]+) \|", capsys.readouterr().out, re.MULTILINE)
    assert len(rows) == 3
    (_, size, _), _, (_, finer, _) = rows
    assert float(finer) > float(size), "groups of 64 hold more scales"


@pytest.mark.slow
def test_the_gate_makes_a_reference_then_compares(tmp_path: Path) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text(
        "".join(
            f'{{"id": "{n}", "task": "t", "images": [], "question": "What is {n}?", "answers": ["yes"]}}\n'
            for n in range(12)
        )
    )
    with serving(Behaviour()) as baseline, serving(Behaviour()) as candidate:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MODEL": baseline.url,
            "CANDIDATE": candidate.url,
            "TASKS": str(questions),
            "BENCH": "--concurrency none --fidelity 0",
        }
        command = [str(EXAMPLES / "ci/gate.sh"), str(tmp_path / "reference"), str(tmp_path / "out")]
        runs = [
            subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True) for _ in range(2)
        ]
    for ran in runs:
        assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "this one is it from now on" in runs[0].stdout
    assert (tmp_path / "out/comment.md").is_file() and (tmp_path / "out/compare.html").is_file()


def test_the_workflow_is_one_that_github_takes() -> None:
    workflow = EXAMPLES / "ci/quality-gate.yml"
    checked = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(workflow)],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    run = "\n".join(step.get("run", "") for step in yaml.safe_load(workflow.read_text())["jobs"]["gate"]["steps"])
    assert "examples/ci/gate.sh" in run


def test_the_kubernetes_example_is_the_server_on_cpus() -> None:
    import kubernetes_validate

    from tests.unit.deploy.conftest import tool

    tool("kubectl")  # skips where there is none
    done = subprocess.run(
        [str(EXAMPLES / "kubernetes/deploy.sh")],
        env={**os.environ, "DRY_RUN": "1", "IMAGE": "here/qvl:1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    manifests = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == "here/qvl:1" and container["args"][0] == "demo"
    assert "--backend=cpu" in container["args"] and "nvidia.com/gpu" not in str(container["resources"])
    assert {"name": "models", "emptyDir": {}} in pod["volumes"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "notebook",
    [pytest.param(path, marks=pytest.mark.release if path.stem == "layers" else ()) for path in NOTEBOOKS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_from_top_to_bottom(notebook: Path, tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    read = nbformat.read(notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in read.cells), "outputs do not belong into the repository"
    client = nbclient.NotebookClient(read, timeout=300, resources={"metadata": {"path": str(notebook.parent)}})
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in read.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    assert "layer" in printed or "questions" in printed


def test_every_example_is_named() -> None:
    page = (EXAMPLES / "README.md").read_text()
    for path in (*EXAMPLES.glob("*.py"), *NOTEBOOKS, EXAMPLES / "ci/gate.sh", EXAMPLES / "kubernetes/deploy.sh"):
        assert f"({path.relative_to(EXAMPLES)})" in page, path
    for target in re.findall(r"\]\(([^)#]+)\)", page + (EXAMPLES / "ci/README.md").read_text()):
        assert any((base / target).exists() for base in (EXAMPLES, EXAMPLES / "ci")), target
