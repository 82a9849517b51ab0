"""Which settings a server can have, and what follows from them for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from serve.settings.arguments import vllm_arguments
from serve.settings.config import ServerConfig, kv_bytes_per_token
from serve.settings.engine import EngineSettings
from serve.settings.limits import Limits
from serve.settings.parallel import Parallel
from tests.unit.serve.settings.test_arguments import real_size
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ServerError
from toolkit.paths import demo_checkpoint


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_small_models_keep_float16_and_real_ones_do_not(demo: Checkpoint, backend: Any) -> None:
    options = ServerConfig(backend=backend)
    assert options.dtype_for(demo) == "float16"
    assert options.dtype_for(real_size(demo)) == "bfloat16"
    assert ServerConfig(backend=backend, dtype="float16").dtype_for(demo) == "float16"


def test_awq_has_no_float32(demo: Checkpoint, awq: Checkpoint) -> None:
    options = ServerConfig(backend="cpu", dtype="float32")
    assert options.dtype_for(demo) == "float32"
    with pytest.raises(ServerError, match="float16 or bfloat16"):
        vllm_arguments(options, awq, "m")


def test_longest_sequence(demo: Checkpoint) -> None:
    assert ServerConfig(backend="gpu").max_model_len_for(demo) == 4096  # its positions
    assert ServerConfig(backend="cpu", max_model_len=512).max_model_len_for(demo) == 512
    with pytest.raises(ServerError, match="has 4096 positions"):
        ServerConfig(backend="cpu", max_model_len=4097).max_model_len_for(demo)


def test_the_guards_longest_answer_fits_into_the_context(demo: Checkpoint) -> None:
    """Else the default that it gives to requests without max_tokens would be refused by vLLM, each time."""
    cases: tuple[tuple[int | None, dict[str, int], int], ...]
    cases = ((2048, {}, 2048), (4096, {}, 4096), (None, {}, 4096), (2048, {"max_tokens": 99}, 99))
    for context, asked, expected in cases:
        limits = Limits(api_key="k").replaced(**asked)
        fitted = ServerConfig(backend="cpu", guard=limits, max_model_len=context).fitted(demo)
        assert fitted.guard == limits.replaced(max_tokens=expected)
    profiled = ServerConfig(backend="cpu", guard=Limits(), settings=EngineSettings(max_model_len=512)).fitted(demo)
    assert profiled.guard == Limits(max_tokens=512)
    assert ServerConfig(backend="cpu", max_model_len=512).fitted(demo).guard is None


def test_kv_bytes_of_published_shapes(demo: Checkpoint) -> None:
    # Qwen2-VL-2B: 2 x 28 layers x 2 KV heads x 128 x 2 bytes = 28 KiB a token
    assert kv_bytes_per_token(real_size(demo), "bfloat16") == 28 * 1024


@pytest.mark.parametrize(
    "flag", ["--port=1", "--port", "--api-key", "--served-model-name", "--host", "--max-model-len"]
)
def test_further_flags_that_are_options_here(flag: str) -> None:
    with pytest.raises(ServerError, match="use qvl's own --"):
        ServerConfig(extra=(flag, "x"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 0}, "--port 0"),
        ({"port": 65536}, "--port 65536"),
        ({"host": ""}, "--host is empty"),
        ({"max_model_len": 0}, "--max-model-len 0"),
        ({"max_num_seqs": -1}, "--max-num-seqs -1"),
        ({"gpu_memory_utilization": 1.5}, "--gpu-memory-utilization 1.5"),
        ({"gpu_memory_utilization": 0.0}, "--gpu-memory-utilization 0"),
        ({"dtype": "int8"}, "--dtype int8: one of float16"),
        ({"timeout": 0}, "--timeout 0"),
        ({"drain": 0}, "cut off"),
        ({"probe_every": 0}, "at least a second"),
        ({"log_format": "xml"}, "text or json"),
        ({"host": "0.0.0.0"}, "anyone who reaches it"),
        ({"host": "192.168.1.4", "guard": Limits()}, "--insecure"),
        ({"play_beside": "ftp://x", "play": True}, "give an address"),
        ({"play_beside": "http://127.0.0.1:1"}, "give --play too"),
        ({"images_per_request": 0}, "at least one image"),
        ({"backend": "tpu"}, "give cpu or gpu"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ServerError, match=message):
        ServerConfig(**settings)


def test_url_for_clients_on_this_machine() -> None:
    assert ServerConfig(port=1234).url == "http://127.0.0.1:1234"
    assert ServerConfig(host="0.0.0.0", port=1234, insecure=True).url == "http://127.0.0.1:1234"
    assert ServerConfig(host="::", port=1234, insecure=True).url == "http://[::1]:1234"
    assert ServerConfig(host="::1", port=1234).url == "http://[::1]:1234"


def test_names(tmp_path: Path) -> None:
    assert ServerConfig().name_for(demo_checkpoint()) == "demo"
    assert ServerConfig().name_for(tmp_path / "my-model") == "my-model"
    assert ServerConfig(served_model_name="x").name_for(demo_checkpoint()) == "x"


def test_key_from_the_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "outside")
    assert ServerConfig().api_key == "outside"


@pytest.mark.parametrize("name", ["QVL_API_KEY", "VLLM_API_KEY"])
def test_an_empty_variable_opens_no_door(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """QVL_API_KEY=$(cat missing) is not meant to do without a key, not even on this machine."""
    monkeypatch.setenv(name, "")
    with pytest.raises(ServerError, match=f"{name} is set and empty"):
        ServerConfig(guard=Limits())
    ServerConfig(guard=Limits(api_key_file=str(tmp_path / "keys")))
    ServerConfig(guard=Limits(), api_key="a-key")
    with pytest.raises(ServerError, match="--api-key is empty"):
        ServerConfig(host="0.0.0.0", api_key="")


def test_a_key_opens_the_door_to_others(tmp_path: Path) -> None:
    keys = Limits(api_key_file=str(tmp_path / "keys"))
    assert ServerConfig(host="0.0.0.0", guard=keys).guard == keys
    assert ServerConfig(host="0.0.0.0", api_key="k").guard is None
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"):
        assert ServerConfig(host=host, guard=Limits()).host == host


@pytest.mark.parametrize(
    "flag",
    [
        "--middleware=a.b",
        "--middlew",
        "--allowed_media_domains",
        "--enable-log-requests",
        "--config=x.yaml",
        "--api-server-count",
        "--trust-request-mm-kwargs",
        "--grpc",
    ],
)
def test_flags_that_would_undo_the_guard(flag: str) -> None:
    with pytest.raises(ServerError, match="would undo the guard: "):
        ServerConfig(guard=Limits(), extra=(flag, "x"))
    ServerConfig(extra=(flag, "x"))  # without a guard vLLM is as it comes


def test_flags_that_are_options_of_qvl() -> None:
    for flag in ("--api-key=x", "--shutdown-timeout", "--lora-modules", "--served_model_name", "--uds"):
        with pytest.raises(ServerError, match="use qvl's own"):
            ServerConfig(extra=(flag, "x"))
    ServerConfig(guard=Limits(), extra=("--tensor-parallel-size", "2", "--mm-processor-kwargs", "{}", "-tp", "2"))


def test_what_a_command_line_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    given = {"drain": "2m", "probe_every": "45", "guard": Limits(max_n=1), "parallel": Parallel(dp=2)}
    found = ServerConfig.from_options(given)
    assert (found.drain, found.probe_every, found.probe_timeout) == (120.0, 45.0, 20.0)
    assert (found.guard, found.parallel.gpus) == (Limits(max_n=1), 2)
    assert found.log_format == "json" and ServerConfig().log_format == "text"
    assert ServerConfig.from_options({"detach": True}).log_format == "text"
    assert ServerConfig.from_options({"log_format": "text"}).log_format == "text"
    with pytest.raises(ServerError, match="--probe-timeout soon: give a time such as 30s or 2m"):
        ServerConfig(probe_timeout="soon")


def test_a_changed_copy_is_checked() -> None:
    config = ServerConfig(backend="cpu", guard=Limits(), api_key="k")
    assert config.replaced(port=1).replaced(port=8000) == config
    with pytest.raises(ServerError, match="would undo the guard"):
        config.replaced(extra=("--grpc",))
