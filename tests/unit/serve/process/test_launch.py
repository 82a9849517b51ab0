"""What vLLM's process finds in its environment."""

from __future__ import annotations

import json
from pathlib import Path

from serve.process.launch import server_environment
from serve.settings.config import ServerConfig
from serve.settings.limits import Limits


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


def test_the_page_is_told_what_a_token_of_the_model_takes() -> None:
    environment = server_environment(ServerConfig(backend="cpu", play=True), {}, "m", token_pixels=32 * 32)
    assert json.loads(environment["QVL_PLAY"]) == {"beside": None, "token_pixels": 1024}


def test_json_logs_have_a_configuration(tmp_path: Path) -> None:
    environment = server_environment(ServerConfig(backend="cpu", log_format="json"), {}, "m")
    config = json.loads(Path(environment["VLLM_LOGGING_CONFIG_PATH"]).read_text())
    assert config["handlers"]["json"]["class"] == "serve.http.logs.JsonHandler"
    assert "VLLM_LOGGING_CONFIG_PATH" not in server_environment(ServerConfig(backend="cpu"), {}, "m")
