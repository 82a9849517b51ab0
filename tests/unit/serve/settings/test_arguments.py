"""What vLLM's own command line is told."""

from __future__ import annotations

import itertools
import json

from serve.settings.arguments import middleware, vllm_arguments
from serve.settings.config import ServerConfig
from serve.settings.limits import Limits
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.paths import demo_checkpoint


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


def test_further_flags_come_last(demo: Checkpoint) -> None:
    arguments = vllm_arguments(ServerConfig(backend="cpu", extra=("--max-num-seqs", "2")), demo, "m")
    assert arguments[-2:] == ["--max-num-seqs", "2"]


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
    # No images from clients, but the probe's own; no videos unless they are allowed.
    assert json.loads(found["--limit-mm-per-prompt"] or "") == {"image": 1, "video": 0}
