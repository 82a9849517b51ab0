"""What is refused before a boot over several GPUs, and what vLLM is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.plan.capacity import shape as sized
from serve.process import memory
from serve.settings import parallel
from serve.settings.backend import Gpu
from serve.settings.config import ServerConfig
from serve.settings.parallel import Parallel
from tests.support import tiny
from tests.unit.toolkit.checkpoint.test_engines import awq
from tests.unit.toolkit.checkpoint.test_engines import checkpoint as shape
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ResourceError, ServerError


def refusal(spread: Parallel, checkpoint: Checkpoint, gpus: int = 8, backend: parallel.Backend = "gpu") -> str:
    with pytest.raises(ServerError) as caught:
        spread.check(checkpoint, backend, gpus)
    return str(caught.value)


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("flag", ["tp", "dp", "pp"])
def test_no_number(flag: str, number: int) -> None:
    with pytest.raises(ServerError, match=f"--{flag} {number}"):
        Parallel(**{flag: number})


def test_groups_that_would_straddle_gpus() -> None:
    said = refusal(Parallel(tp=2), shape("72B", awq()))
    assert "down_proj's 29568 inputs don't divide by 128 x 2" in said
    assert "--tp 1 works" in said and "--pad-tp 2` makes 2 work" in said and "--pp 2 splits whole layers" in said
    Parallel(tp=8).check(shape("72B padded", awq()), "gpu", 8)
    Parallel(tp=8).check(shape("72B"), "gpu", 8)


def test_heads_that_do_not_divide() -> None:
    said = refusal(Parallel(tp=8), shape("7B", awq()))
    assert "28 attention heads don't divide by 8" in said and "--tp 1 or 2 or 4 works" in said
    assert "--pad-tp" not in said  # it would not help
    assert "don't divide by 3" in refusal(Parallel(tp=3), shape("7B"))


def test_more_gpus_than_there_are() -> None:
    said = refusal(Parallel(tp=4, dp=2), shape("7B", awq()), gpus=4)
    assert "needs 8 GPUs, and this machine has 4" in said and "--dp 4 works, or --tp 4" in said
    assert "--dp 3 works, or --tp 2." in refusal(Parallel(tp=4), shape("7B", awq()), gpus=3)
    assert "Leave these options out" in refusal(Parallel(dp=2), shape("7B", awq()), gpus=1)
    Parallel(tp=2, dp=2).check(shape("7B", awq()), "gpu", 4)


def test_more_stages_than_layers() -> None:
    assert "has 1 layers" in refusal(Parallel(pp=2), shape("7B"))


def test_a_cpu(tmp_path: Path) -> None:
    small = Checkpoint.open(tiny.write(tmp_path / "m", version="gemm"))
    assert "dies at the first request" in refusal(Parallel(pp=2), small, backend="cpu")
    assert "does not run under Ray" in refusal(Parallel(ray=True), small, backend="cpu")
    Parallel(tp=2, dp=2).check(small, "cpu")
    assert "multiples of 32" in refusal(Parallel(tp=16), shape("72B", awq(group_size=8)), backend="cpu")


def test_ray_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    assert "pip install ray" in refusal(Parallel(ray=True, tp=2), shape("7B"))
    monkeypatch.setattr(parallel, "find_spec", lambda name: object())
    Parallel(ray=True, tp=4, dp=4).check(shape("7B"), "gpu", 0)  # other machines have the GPUs


def test_arguments() -> None:
    seven = shape("7B", awq())
    assert Parallel().arguments(seven) == []
    words = ["--tensor-parallel-size", "2", "--data-parallel-size", "3", "--api-server-count", "1"]
    assert Parallel(tp=2, dp=3).arguments(seven) == words
    assert Parallel(pp=2, ray=True).arguments(seven)[-2:] == ["--distributed-executor-backend", "ray"]
    assert Parallel(tp=2).arguments(shape("7B", vision_heads=5))[-2:] == ["--mm-encoder-tp-mode", "data"]


def test_one_process_is_not_asked_of_several() -> None:
    base = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "A": "1"}
    assert Parallel().environment(base) == base
    assert Parallel(tp=2).environment(base) == {"A": "1"}


@pytest.mark.parametrize(
    ("named", "count"), [(None, 4), ("0,1", 2), ("GPU-1", 1), ("", 0), ("-1", 0), ("0,1,2,3,4,5", 4)]
)
def test_visible_gpus(monkeypatch: pytest.MonkeyPatch, named: str | None, count: int) -> None:
    monkeypatch.setattr(parallel, "find_gpus", lambda: [Gpu("H100", 1, 1)] * 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert parallel.visible_gpus() == count


def test_the_memory_of_each_gpu_and_of_all_processes() -> None:
    seven = sized("7b", True)

    def needed(backend: parallel.Backend, **spread: int) -> memory.MemoryNeed:
        return memory.need(seven, ServerConfig(backend=backend, parallel=Parallel(**spread)))

    one, four = needed("gpu"), needed("gpu", tp=2, pp=2)
    assert four.weights == one.weights // 4 and four.kv_cache == one.kv_cache // 4
    assert needed("gpu", dp=2) == one  # each has a GPU of its own
    whole, split, copies = needed("cpu"), needed("cpu", tp=2), needed("cpu", dp=2)
    assert split.weights == whole.weights and copies.weights == 2 * whole.weights
    assert whole.overhead < split.overhead == copies.overhead


def test_the_fullest_of_the_gpus_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    gpus = [Gpu("L4", 24 * gib, 23 * gib), Gpu("L4", 24 * gib, 4 * gib)]
    monkeypatch.setattr(memory, "find_gpus", lambda: gpus)
    seven = sized("7b", True)
    memory.check(seven, ServerConfig(backend="gpu"))  # takes the free one
    with pytest.raises(ResourceError, match=r"L4 has 4\.0 of 24\.0 GiB free"):
        memory.check(seven, ServerConfig(backend="gpu", parallel=Parallel(dp=2)))
