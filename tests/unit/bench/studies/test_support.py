"""The support matrix: what is committed is what is made, and nothing is claimed that can't be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.studies.support import Claim, Place, claims, made, reports
from tests.support.paths import ROOT
from toolkit.errors import BenchError
from toolkit.models.families import FAMILIES


def test_the_committed_matrix_is_what_is_made() -> None:
    assert (ROOT / "docs" / "support.md").read_text(encoding="utf-8") == made(ROOT), "run `make support-matrix`"


def test_every_family_is_there_and_served_somewhere() -> None:
    page = made(ROOT)
    for family in FAMILIES:
        rows = [line for line in page.splitlines() if line.startswith(f"| {family.title} |")]
        assert len(rows) == 4
        assert all("tested" in row or "measured" in row or "computed" in row for row in rows)


def write(root: Path, test: str, *systems: tuple[str, str], gpus: tuple[str, ...] = ()) -> Path:
    (root / "tests").mkdir()
    (root / "tests" / "test_it.py").write_text(f"import pytest\n\n\n{test}\ndef test_it() -> None:\n    pass\n")
    report = root / "docs" / "results" / "one"
    report.mkdir(parents=True)
    found = {str(i): {"model_type": kind, "quantization": words} for i, (kind, words) in enumerate(systems)}
    (report / "report.json").write_text(json.dumps({"systems": found, "environment": {"gpus": list(gpus)}}))
    return root


MARK = '@pytest.mark.supports("qwen2_vl", "gemm", "vllm", "CPU")'
H100 = "NVIDIA H100 80GB HBM3, 81559 MiB, 580.159.04"


def row(page: str, form: str) -> list[str]:
    line = next(line for line in page.splitlines() if line.startswith(f"| Qwen2-VL | {form} |"))
    return [cell.strip() for cell in line.split("|")[3:-1]]


def test_a_cell_says_the_strongest_that_is_known(tmp_path: Path) -> None:
    root = write(tmp_path, MARK, ("qwen2_vl", "awq 4 bits, group 128, gemm"), ("qwen2_vl", "bfloat16"), gpus=(H100,))
    page = made(root)
    heads = next(line for line in page.splitlines() if line.startswith("| family")).split("|")[3:-1]
    assert [head.strip() for head in heads][:3] == ["vLLM, CPU", "vLLM, H100", "vLLM, other NVIDIA"]
    cpu, h100, other, transformers, autoawq = row(page, "gemm")
    assert cpu.startswith("tested") and h100.startswith("measured") and other.startswith("computed")
    assert transformers == "-" and autoawq.startswith("computed")
    assert "`tests/test_it.py::test_it`" in page and "[one](results/one/report.json)" in page
    assert row(page, "16 bits")[:3] == ["computed", h100, "computed"]
    assert row(page, "compressed-tensors")[4].startswith("no")
    assert all(cell.startswith(("computed", "-", "no")) for cell in row(page, "gemv"))


def test_claims_name_their_test(tmp_path: Path) -> None:
    root = write(tmp_path, MARK)
    place = Place("qwen2_vl", "gemm", "vllm", "CPU")
    assert list(claims(root / "tests")) == [Claim(place, "tested", "tests/test_it.py::test_it")]


@pytest.mark.parametrize(
    ("systems", "found"),
    [
        ((("qwen2_vl", "awq 4 bits, group 128, gemv"),), {"gemv"}),
        ((("qwen2_vl", "compressed-tensors 4 bits, group 128"),), {"compressed-tensors"}),
        ((("qwen9_vl", "bfloat16"), ("qwen2_vl", "gptq 4 bits"), ("qwen2_vl", "unknown")), set()),
    ],
)
def test_reports_say_family_and_format(tmp_path: Path, systems: tuple[tuple[str, str], ...], found: set[str]) -> None:
    root = write(tmp_path, "", *systems)
    assert {claim.place.format for claim in reports(root / "docs" / "results")} == found


def test_reports_that_say_no_family_are_of_the_first(tmp_path: Path) -> None:
    root = write(tmp_path, "", ("qwen2_vl", "bfloat16"), gpus=(H100,))
    file = root / "docs" / "results" / "one" / "report.json"
    file.write_text(file.read_text().replace('"model_type": "qwen2_vl", ', ""))
    (claim,) = reports(root / "docs" / "results")
    assert claim.place == Place("qwen2_vl", "16 bits", "vllm", "H100")
    file.write_text(file.read_text().replace('"quantization"', '"model_type": null, "quantization"'))
    assert list(reports(root / "docs" / "results")) == []  # newer, of a server whose directory is not known


@pytest.mark.parametrize(
    ("mark", "said"),
    [
        ('@pytest.mark.supports("qwen9_vl", "gemm", "vllm", "CPU")', "'qwen9_vl' is none of"),
        ('@pytest.mark.supports("qwen2_vl", "gguf", "vllm", "CPU")', "'gguf' is none of"),
        ('@pytest.mark.supports("qwen2_vl", "gemm", "sglang", "CPU")', "'sglang' is none of"),
        ('@pytest.mark.supports("qwen2_vl", "gemm")', "takes four texts"),
        ('@pytest.mark.supports(X, "gemm", "vllm", "CPU")', "takes four texts"),
        ('@pytest.mark.supports("qwen2_vl", "compressed-tensors", "autoawq", "NVIDIA")', "computed not to run"),
    ],
)
def test_claims_that_can_not_be(tmp_path: Path, mark: str, said: str) -> None:
    with pytest.raises(BenchError, match=said):
        made(write(tmp_path, mark))
