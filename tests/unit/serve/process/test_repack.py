from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from serve.process import repack as gemm
from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ResourceError
from toolkit.formats.packing import PackedLinear, unpack_gemm, unpack_gemv


def packed(checkpoint: Checkpoint, module: str) -> PackedLinear:
    return PackedLinear(*(checkpoint.get(f"{module}.{part}") for part in ("qweight", "qzeros", "scales")))


@pytest.mark.parametrize("version", [None, "gemm"])
def test_what_vllm_reads_stays(tmp_path: Path, cache: Path, version: str | None) -> None:
    checkpoint = Checkpoint.open(tiny.write(tmp_path / "model", version=version))
    assert gemm.servable(checkpoint) is checkpoint
    assert not (cache / "gemm").exists()


def test_gemv_is_repacked_once_and_says_so(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Checkpoint.open(tiny.write(tmp_path / "model", version="gemv"))
    twin = gemm.servable(source)
    said = capsys.readouterr().err
    assert "GEMV" in said and "repacking it as GEMM" in said
    assert twin.path.parent == cache / "gemm"
    assert twin.quantization is not None and twin.quantization.format == "gemm"
    for module in source.quantized_modules():
        before = unpack_gemv(packed(source, module), group_size=64)
        after = unpack_gemm(packed(twin, module))
        for part in ("values", "zeros", "scales"):
            assert torch.equal(getattr(before, part), getattr(after, part)), (module, part)

    stamp = (twin.path / "config.json").stat().st_mtime_ns
    copy = shutil.copytree(source.path, tmp_path / "elsewhere")
    again = gemm.servable(Checkpoint.open(copy))
    assert again.path == twin.path
    assert (twin.path / "config.json").stat().st_mtime_ns == stamp
    assert "repacking" not in capsys.readouterr().err


def test_linears_in_16_bits_stay(tmp_path: Path) -> None:
    left = frozenset({(0, "mlp.down_proj"), (1, "self_attn.o_proj")})
    source = Checkpoint.open(tiny.write(tmp_path / "model", version="gemv", left=left))
    twin = gemm.servable(source)
    assert twin.left_linears() == left
    assert twin.quantized_modules() == source.quantized_modules()
    for index, name in left:
        weight = f"{source.layer_prefix(index)}{name}.weight"
        assert torch.equal(twin.get(weight), source.get(weight))


def test_two_starts_at_once_repack_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tiny.write(tmp_path / "model", version="gemv")
    with ThreadPoolExecutor(4) as pool:
        twins = list(pool.map(lambda _: gemm.servable(Checkpoint.open(directory)).path, range(4)))
    assert len(set(twins)) == 1
    assert capsys.readouterr().err.count("repacking it as GEMM") == 1


def test_other_weights_are_another_twin(tmp_path: Path) -> None:
    one = gemm.servable(Checkpoint.open(tiny.write(tmp_path / "a", version="gemv", seed=1)))
    two = gemm.servable(Checkpoint.open(tiny.write(tmp_path / "b", version="gemv", seed=2)))
    assert one.path != two.path


def test_a_damaged_twin_is_made_again(tmp_path: Path) -> None:
    source = Checkpoint.open(tiny.write(tmp_path / "model", version="gemv"))
    twin = gemm.servable(source).path
    (twin / "model.safetensors").write_bytes(b"damaged")
    assert gemm.servable(source).quantized_modules() == source.quantized_modules()


def test_a_changed_chat_template_is_another_twin(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "model", version="gemv")
    before = gemm.servable(Checkpoint.open(source)).path
    (source / "chat_template.json").write_text('{"chat_template": "changed"}')
    after = gemm.servable(Checkpoint.open(source)).path
    assert after != before
    assert (after / "chat_template.json").read_text() == '{"chat_template": "changed"}'


def test_a_full_disk_names_the_cache_and_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Checkpoint.open(tiny.write(tmp_path / "model", version="gemv"))
    with monkeypatch.context() as full:
        full.setattr("toolkit.checkpoint.writer.free_bytes", lambda place: 10)
        with pytest.raises(ResourceError, match=r"disk full: .*QVL_CACHE"):
            gemm.servable(source)
    assert [entry.name for entry in (cache / "gemm").iterdir() if not entry.name.endswith(".lock")] == []
    assert gemm.servable(source).quantization is not None
