"""What `qvl serve` fills in from profiles and from the card's memory, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.plan import tuned
from serve.plan.capacity import shape
from serve.process.launch import server_environment
from serve.settings.arguments import vllm_arguments
from serve.settings.backend import Gpu
from serve.settings.config import ServerConfig
from serve.settings.engine import EngineSettings
from serve.settings.environment import KERNELS
from serve.settings.parallel import Parallel
from serve.settings.profiles import Measured, Profile, key_for, save
from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ServerError
from toolkit.paths import cache_dir

GIB = 1 << 30
SEVEN = shape("7b", True)


def fitted(card: float, **options: object) -> tuple[ServerConfig, list[str]]:
    notes: list[str] = []
    given = ServerConfig(backend="gpu", **options)  # type: ignore[arg-type]
    return tuned.fit_card(SEVEN, given, int(card * GIB), notes.append), notes


def test_a_card_with_room_changes_nothing() -> None:
    assert fitted(80) == (ServerConfig(backend="gpu"), [])
    assert fitted(16) == (ServerConfig(backend="gpu"), [])


def test_images_give_way_before_the_context() -> None:
    found, notes = fitted(11.9)
    assert found.settings.max_pixels == 4096 * 784 and found.max_model_len == 16384
    assert "images of up to 3,211,264 pixels" in notes[0] and "--max-model-len decides otherwise" in notes[0]


def test_then_the_context() -> None:
    found, notes = fitted(10.6)
    assert found.max_model_len is not None and 512 <= found.max_model_len < 16384
    assert f"a context of {found.max_model_len} tokens" in notes[0]


def test_what_does_not_fit_is_left_to_the_check_of_memory() -> None:
    assert fitted(6) == (ServerConfig(backend="gpu"), [])


def test_the_users_word_counts() -> None:
    assert fitted(10.6, max_model_len=16384)[1] == []


@pytest.mark.parametrize(("context", "tokens"), [(2048, 1536), (4096, 3584), (16384, 15872), (100, 75)])
def test_an_image_fits_into_the_context(context: int, tokens: int) -> None:
    """The processor lets images of 16,384 tokens through: a shorter context would refuse every photo."""
    notes: list[str] = []
    given = ServerConfig(backend="gpu", max_model_len=context)
    found = tuned.fit_images(SEVEN, given, notes.append)
    assert found.settings.max_pixels == tokens * 784
    assert f"images of more than {tokens * 784:,} pixels are scaled down" in notes[0]


def test_images_are_left_alone_where_there_is_room_or_somebody_has_said_how_large() -> None:
    for given in (
        ServerConfig(backend="gpu", max_model_len=32768),
        ServerConfig(backend="gpu", max_model_len=2048, settings=EngineSettings(max_pixels=784 * 4096)),
        ServerConfig(backend="gpu", max_model_len=2048, extra=("--mm-processor-kwargs", '{"max_pixels": 3211264}')),
    ):
        notes: list[str] = []
        assert tuned.fit_images(SEVEN, given, notes.append) == given and not notes


class TestProfile:
    @pytest.fixture
    def model(self, tmp_path: Path, cache: Path) -> str:
        path = tiny.write(tmp_path / "m", version="gemm")
        key = key_for(Checkpoint.open(path), "cpu")
        candidates = {
            "slow": EngineSettings(),
            "fast": EngineSettings(max_num_seqs=3, max_num_batched_tokens=99, compile=True),
        }
        save(Profile(key, candidates, (Measured(1, {"slow": 1.0, "fast": 2.0}),)))
        return str(path)

    def test_it_is_picked_up_and_said(self, model: str) -> None:
        notes: list[str] = []
        options = tuned.tuned(model, ServerConfig(backend="cpu"), notes.append)
        assert notes and notes[0].startswith("profile auto: fast (")
        words = vllm_arguments(options, Checkpoint.open(model), "m")
        assert words[words.index("--max-num-seqs") + 1] == "3"
        assert words[words.index("--max-num-batched-tokens") + 1] == "99"
        assert "--enforce-eager" not in words

    def test_what_is_given_wins(self, model: str) -> None:
        extra = ("--max-num-batched-tokens", "77")
        given = ServerConfig(backend="cpu", profile="latency", max_num_seqs=5, compile=False, extra=extra)
        words = vllm_arguments(tuned.tuned(model, given, lambda said: None), Checkpoint.open(model), "m")
        assert words[words.index("--max-num-seqs") + 1] == "5" and "--enforce-eager" in words
        assert words.count("--max-num-batched-tokens") == 1 and "77" in words

    def test_off(self, model: str) -> None:
        notes: list[str] = []
        given = ServerConfig(backend="cpu", profile="off")
        assert tuned.tuned(model, given, notes.append) == given
        assert notes == []

    def test_no_mode(self) -> None:
        with pytest.raises(ServerError, match="--profile best"):
            ServerConfig(backend="cpu", profile="best")


def test_caches_and_processes_reach_the_environment() -> None:
    plain = server_environment(ServerConfig(backend="cpu"), {}, "m")
    spread = server_environment(ServerConfig(backend="cpu", parallel=Parallel(tp=2)), {}, "m")
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in spread
    assert set(plain) - set(spread) <= {"VLLM_ENABLE_V1_MULTIPROCESSING"}
    assert plain["HUMMING_CACHE_DIR"] == str(cache_dir("humming"))  # compiled once, not at every start
    assert KERNELS not in plain  # our kernel is vLLM's to take only where a profile or the user says so


@pytest.mark.parametrize(("kernel", "switch"), [("qvl", "on"), ("marlin", "off")])
def test_our_kernel_is_switched_by_the_environment(kernel: str, switch: str) -> None:
    config = ServerConfig(backend="gpu", settings=EngineSettings(kernel=kernel))
    assert server_environment(config, {}, "m")[KERNELS] == switch
    assert server_environment(config, {KERNELS: "off"}, "m")[KERNELS] == "off"  # the user's word counts


def test_a_spread_that_can_not_be_is_refused_with_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.settings.parallel.find_gpus", lambda: [Gpu("H100", 1, 1)] * 8)
    options = ServerConfig(backend="gpu", parallel=Parallel(tp=8))
    with pytest.raises(ServerError, match="28 attention heads"):
        vllm_arguments(options, SEVEN, "m")
    words = vllm_arguments(ServerConfig(backend="gpu", parallel=Parallel(tp=4)), SEVEN, "m")
    assert words[words.index("--tensor-parallel-size") + 1] == "4"
