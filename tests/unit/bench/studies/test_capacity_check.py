"""What is read from vLLM's log, and how it is held against an estimate."""

from __future__ import annotations

from bench.studies.capacity_check import compare, read_log

LOG = """
(Worker pid=7) INFO 11-23 11:08:03 [gpu_model_runner.py:5000] Model loading took 6.65 GiB memory and 3.1 seconds
(Worker pid=7) INFO 11-23 11:08:03 [gpu_worker.py:760] Available KV cache memory: 4.5 GiB
(EngineCore pid=6) INFO 11-23 11:08:03 [kv_cache_utils.py:2327] GPU KV cache size: 84,256 tokens, Maximum concurrency
"""


def test_a_log() -> None:
    found = read_log(LOG)
    assert found == {"weights_bytes": round(6.65 * 2**30), "kv_cache_bytes": round(4.5 * 2**30), "kv_tokens": 84256}
    assert read_log("CPU KV cache size: 39,040 tokens, Maximum") == {"kv_tokens": 39040}
    assert read_log("") == {}


def test_differences_are_in_percent_of_what_was_reported() -> None:
    assert compare({"kv_tokens": 110, "weights_bytes": 90, "x": 1}, {"kv_tokens": 100, "weights_bytes": 100}) == {
        "kv_tokens": 10.0,
        "weights_bytes": -10.0,
    }
