from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from serve.process.launch import server_environment
from serve.settings.arguments import middleware, vllm_arguments
from serve.settings.config import ServerConfig, kv_bytes_per_token
from serve.settings.limits import Limits
from tests.support import tiny
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.errors import ServerError
from toolkit.paths import demo_checkpoint


@pytest.fixture
def demo() -> Checkpoint:
    return Checkpoint.open(demo_checkpoint())


@pytest.fixture
def awq(tmp_path: Path) -> Checkpoint:
    return Checkpoint.open(tiny.write(tmp_path / "tiny-awq", version="gemm"))


def real_size(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with the text settings of Qwen2-VL-2B."""
    checkpoint.text_config |= {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    }
    return checkpoint


def flags(arguments: list[str]) -> dict[str, str | None]:
    """Flags and their values; "" holds the rest."""
    found: dict[str, str | None] = {}
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        if argument.startswith("--"):
            found[argument] = None if following.startswith("--") else following
    return found


def test_cpu_arguments(demo: Checkpoint) -> None:
    arguments = vllm_arguments(ServerConfig(backend="cpu", port=8123), demo, "demo")
    assert arguments[:2] == ["serve", str(demo_checkpoint().resolve())]
    found = flags(arguments)
    assert found["--host"] == "127.0.0.1"
    assert found["--port"] == "8123"
    assert found["--served-model-name"] == "demo"
    assert found["--dtype"] == "float16"
    assert found["--max-model-len"] == "4096"
    assert found["--max-num-seqs"] == "8"
    assert json.loads(found["--limit-mm-per-prompt"] or "") == {"image": 8, "video": 1}
    assert int(found["--shutdown-timeout"] or 0) > 0
    assert "--enforce-eager" in found
    assert "--gpu-memory-utilization" not in found
    # 8 sequences of 4096 tokens and a block of 128, each token 2 x 5 layers x 2 heads x 64 x 2 bytes
    assert int(found["--kv-cache-memory-bytes"] or 0) == (8 * 4096 + 128) * 2560
    assert "--quantization" not in found


def test_gpu_arguments(demo: Checkpoint) -> None:
    found = flags(vllm_arguments(ServerConfig(backend="gpu"), real_size(demo), "m"))
    assert found["--dtype"] == "bfloat16"
    assert found["--max-model-len"] == "16384"
    assert found["--gpu-memory-utilization"] == "0.9"
    assert not {"--max-num-seqs", "--kv-cache-memory-bytes", "--enforce-eager"} & set(found)


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


def test_kv_bytes_of_published_shapes(demo: Checkpoint) -> None:
    # Qwen2-VL-2B: 2 x 28 layers x 2 KV heads x 128 x 2 bytes = 28 KiB a token
    assert kv_bytes_per_token(real_size(demo), "bfloat16") == 28 * 1024


def test_further_flags_come_last(demo: Checkpoint) -> None:
    arguments = vllm_arguments(ServerConfig(backend="cpu", extra=("--max-num-seqs", "2")), demo, "m")
    assert arguments[-2:] == ["--max-num-seqs", "2"]


@pytest.mark.parametrize("flag", ["--port=1", "--port", "--api-key", "--served-model-name", "--host"])
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


def test_environment_hides_the_key_and_respects_what_is_set() -> None:
    options = ServerConfig(backend="cpu", api_key="secret")
    environment = server_environment(
        options, {"HF_HUB_OFFLINE": "0", "PYTHONPATH": "/a", "VLLM_SERVER_DEV_MODE": "1"}, "m"
    )
    assert environment["VLLM_API_KEY"] == "secret"
    assert "secret" not in repr(options)
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["PYTHONPATH"].endswith(":/a")
    assert "VLLM_SERVER_DEV_MODE" not in environment
    assert environment["TORCHDYNAMO_DISABLE"] == "1"


def test_gpu_environment_leaves_compilation_on() -> None:
    environment = server_environment(ServerConfig(backend="gpu"), {}, "m")
    assert not {"TORCHDYNAMO_DISABLE", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_API_KEY"} & set(environment)


def test_key_from_the_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "outside")
    assert ServerConfig().api_key == "outside"


def test_a_key_opens_the_door_to_others(tmp_path: Path) -> None:
    keys = Limits(api_key_file=str(tmp_path / "keys"))
    assert ServerConfig(host="0.0.0.0", guard=keys).guard == keys
    assert ServerConfig(host="0.0.0.0", api_key="k").guard is None
    for host in ("127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"):
        assert ServerConfig(host=host, guard=Limits()).host == host


def test_the_guard_gets_the_keys_and_vllm_does_not() -> None:
    options = ServerConfig(backend="cpu", guard=Limits(max_images=3), api_key="secret")
    outside = {"VLLM_API_KEY": "old", "VLLM_USE_RUST_FRONTEND": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    environment = server_environment(options, outside, "m", began=5.0, restarts=2)
    assert not set(outside) & set(environment)
    assert Limits.loads(environment["QVL_GUARD"]) == Limits(max_images=3, api_key="secret")
    assert environment["QVL_REQUEST_LOG"] == "1"
    ready = json.loads(environment["QVL_READY"])
    assert (ready["model"], ready["began"], ready["restarts"], ready["drain"]) == ("m", 5.0, 2, 30.0)
    assert "secret" not in repr(options)


def test_middleware_from_the_inside_out(demo: Checkpoint) -> None:
    bare = middleware(ServerConfig(backend="cpu"))
    assert bare == ["serve.app.ready.Proof", "serve.app.ready.Ready", "serve.app.requestlog.RequestLog"]
    options = ServerConfig(backend="cpu", guard=Limits(max_images=0), play=True, play_beside="http://127.0.0.1:1")
    assert middleware(options) == [
        "serve.app.ready.Proof",
        "serve.app.play.Beside",
        "serve.guard.app.Guard",
        "serve.app.play.Play",
        "serve.app.ready.Ready",
        "serve.app.requestlog.RequestLog",
    ]
    arguments = vllm_arguments(options, demo, "demo")
    given = [value for flag, value in itertools.pairwise(arguments) if flag == "--middleware"]
    assert given == middleware(options)
    found = flags(arguments)
    assert {"--disable-fastapi-docs", "--disable-uvicorn-access-log"} <= set(found)
    assert found["--api-server-count"] == "1"
    # No pictures from clients, but the probe's own; no videos unless they are allowed.
    assert json.loads(found["--limit-mm-per-prompt"] or "") == {"image": 1, "video": 0}


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


def test_json_logs_have_a_configuration(tmp_path: Path) -> None:
    environment = server_environment(ServerConfig(backend="cpu", log_format="json"), {}, "m")
    config = json.loads(Path(environment["VLLM_LOGGING_CONFIG_PATH"]).read_text())
    assert config["handlers"]["json"]["class"] == "serve.http.logs.JsonHandler"
    assert "VLLM_LOGGING_CONFIG_PATH" not in server_environment(ServerConfig(backend="cpu"), {}, "m")
