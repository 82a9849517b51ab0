"""What vLLM is told of the settings that a profile holds; that it takes it: tests/e2e/test_engine.py."""

from __future__ import annotations

import json

from serve.settings.engine import EngineSettings

ALL = EngineSettings(
    kernel="marlin",
    cudagraph_sizes=(1, 2, 4),
    cudagraph_mode="FULL_AND_PIECEWISE",
    encoder_graphs=True,
    passes=("fuse_norm_quant",),
    performance_mode="interactivity",
    max_num_batched_tokens=4096,
    max_pixels=1003520,
    prefix_caching=False,
    mm_cache_gb=2,
    mm_cache_type="shm",
    kv_cache_dtype="fp8",
    async_scheduling=True,
    ngram=3,
)


def test_nothing_set_is_nothing_said() -> None:
    assert EngineSettings().arguments() == []


def test_the_users_flags_count() -> None:
    given = ["--max-num-batched-tokens", "8", "--no-enable-prefix-caching", "--kv-cache-dtype=auto"]
    words = ALL.arguments(given)
    assert "--max-num-batched-tokens" not in words and "--kv-cache-dtype" not in words
    assert not [word for word in words if "prefix" in word]
    assert "--compilation-config" not in ALL.arguments(["--enforce-eager"])


def test_the_kernel_is_named() -> None:
    assert EngineSettings(kernel="humming").arguments() == ["--linear-backend", "humming"]
    assert EngineSettings(kernel="humming").arguments(["--linear-backend=marlin"]) == []
    # what our kernel declines, vLLM gives to Humming
    assert EngineSettings(kernel="qvl").arguments() == ["--linear-backend", "humming"]


def test_guesses_are_made_on_the_host_or_on_the_gpu() -> None:
    for settings, method in ((EngineSettings(ngram=3), "ngram"), (EngineSettings(ngram_gpu=3), "ngram_gpu")):
        flag, value = settings.arguments()
        assert flag == "--speculative-config"
        assert json.loads(value) == {
            "method": method, "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2
        }  # fmt: skip
