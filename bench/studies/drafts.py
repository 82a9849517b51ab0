"""What guessing tokens ahead brings: the same questions to a model without a draft, with n-grams, with an EAGLE-3 head.

    python -m bench.studies drafts qwen2.5-vl-3b-awq --out out/drafts [--head DIR]

Each server is booted in turn, asked one question at a time, greedily, half of them about an image, and stopped. Without
``--head`` one of random weights is made: it shows that a head boots, that answers stay what they are, and what a draft
costs whose guesses are never right; a trained head's gain takes a trained head.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.studies.settings import DraftSettings
from toolkit.errors import QvlError

if TYPE_CHECKING:
    from serve.process.lifecycle import Server
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["compare", "run", "write_random_head"]

_WORDS = ("What is it?", "Describe it in detail.", "Repeat after me: one two three one two three one two three.")
#: Tokens that a random head may guess, out of the vocabulary.
_GUESSABLE = 512


def write_random_head(checkpoint: Checkpoint, out: Path, *, seed: int = 0) -> Path:
    """Write an EAGLE-3 head for a checkpoint, one layer of random weights, named as SGLang's and SpecForge's are.

    Args:
        checkpoint: the model that it is for.
        out: directory to write.
        seed: of the weights.
    """
    import torch
    from safetensors.torch import save_file

    text, widths = checkpoint.text_config, checkpoint.family.widths(checkpoint.text_config)
    hidden, inner, query, value = (widths[name] for name in ("hidden", "inner", "query", "value"))
    vocabulary, guessable = int(text["vocab_size"]), min(_GUESSABLE, int(text["vocab_size"]) // 2)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": int(text["num_attention_heads"]),
        "num_key_value_heads": int(text["num_key_value_heads"]),
        "head_dim": widths["head"],
        "max_position_embeddings": int(text.get("max_position_embeddings", checkpoint.family.max_positions)),
        "rms_norm_eps": float(text.get("rms_norm_eps", 1e-6)),
        "vocab_size": vocabulary,
        "draft_vocab_size": guessable,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    shapes = {
        "fc.weight": (hidden, 3 * hidden),
        "lm_head.weight": (guessable, hidden),
        "midlayer.self_attn.q_proj.weight": (query, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": (value, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": (value, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": (hidden, query),
        "midlayer.mlp.gate_proj.weight": (inner, hidden),
        "midlayer.mlp.up_proj.weight": (inner, hidden),
        "midlayer.mlp.down_proj.weight": (hidden, inner),
    }
    norms = ("norm", "midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm")
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: (torch.randn(shape, generator=rng) * 0.02).bfloat16() for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
    # guess number i is token i x step: d2t holds what is added to i
    step = vocabulary // guessable
    tensors["d2t"] = torch.arange(guessable) * (step - 1)
    tensors["t2d"] = torch.zeros(vocabulary, dtype=torch.bool)
    tensors["t2d"][torch.arange(guessable) * step] = True
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def _ask(server: Server, settings: DraftSettings) -> dict[str, Any]:
    """Ask all questions, one at a time; return answers as token ids, tokens/s, and what the server counted."""
    import httpx

    from bench.machine.server_metrics import ServerPoint, parse
    from serve.http.images import image_url

    image = {"type": "image_url", "image_url": {"url": image_url(settings.image)}}
    answers, tokens, took = [], 0, 0.0
    with httpx.Client(base_url=server.url, timeout=300, trust_env=False) as client:

        def snapshot() -> Any:
            return parse(client.get("/metrics").text)

        before = snapshot()
        for number in range(settings.questions):
            words = {"type": "text", "text": f"{_WORDS[number // 2 % len(_WORDS)]} ({number})"}
            body = {
                "model": server.model_name,
                "messages": [{"role": "user", "content": [*([image] if number % 2 else []), words]}],
                "temperature": 0,
                "max_tokens": settings.output_tokens,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            began = time.perf_counter()
            answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()["choices"][0]
            took += time.perf_counter() - began
            answers.append(answer["token_ids"])
            tokens += len(answer["token_ids"])
        point = ServerPoint.between(before, snapshot())
    counted = {} if point is None else {name: getattr(point, name) for name in ("drafts", "guessed", "accepted")}
    return {"answers": answers, "tokens_per_s": round(tokens / took, 2), **counted}


def compare(plain: list[list[int]], other: list[list[int]]) -> dict[str, Any]:
    """Return how many answers are equal, and after how many tokens the others part from the plain ones."""
    parts = [
        next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        for one, two in zip(plain, other, strict=True)
        if one != two
    ]
    return {"equal": len(plain) - len(parts), "of": len(plain), "part_after": sorted(parts)}


def run(model: str, settings: DraftSettings) -> None:
    """Boot, ask and stop each server; write drafts.json after each.

    Args:
        model: directory, hub id or ``demo``.
        settings: where to, and how much is asked.
    """
    from bench.machine.environment import gpu_names, versions
    from bench.run.boot import free_ports
    from serve.process import lifecycle
    from serve.settings.config import ServerConfig
    from serve.settings.draft import NGRAM
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.console import note
    from toolkit.sources.directory import resolve

    settings.out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(resolve(model))
    drafts: list[str | None] = [None, NGRAM]
    if checkpoint.family.eagle:
        drafts.append(str(settings.head or write_random_head(checkpoint, settings.out / "random-head")))
    found: dict[str, Any] = {}
    for draft in drafts:
        name = "none" if draft is None else draft if draft == NGRAM else "eagle3"
        options = ServerConfig(port=free_ports(1)[0], draft=draft, max_model_len=2048, probe_every=3600)
        try:
            with lifecycle.start(model, options, attached=True) as server:
                found[name] = _ask(server, settings)
        except QvlError as error:
            found[name] = {"why_not": str(error)}
        if "answers" in found[name] and "answers" in found["none"]:
            found[name] |= compare(found["none"]["answers"], found[name]["answers"])
        report = {"model": Path(model).name, "gpus": gpu_names(), "versions": versions(), "drafts": found}
        (settings.out / "drafts.json").write_text(json.dumps(report, indent=1) + "\n")
        note(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name].items() if key != "answers"))
