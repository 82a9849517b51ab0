"""What guessing tokens ahead brings: the same questions to a model without a draft, with n-grams, with an EAGLE-3 head.

    python -m bench.studies drafts qwen2.5-vl-3b-awq --out out/drafts [--head DIR]

All servers are up at once and asked in turns, one question at a time, greedily, half of them about an image: what else
the machine does meets all alike. Without ``--head`` one of random weights is made: it shows that a head boots, that
answers stay what they are, and what a draft costs whose guesses are never right; a trained head's gain takes a trained
head.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.studies.settings import DraftSettings
from bench.studies.sharing import all_up, beside_others
from toolkit.errors import BenchError, QvlError

if TYPE_CHECKING:
    from serve.process.lifecycle import Server
    from toolkit.checkpoint.checkpoint import Checkpoint

__all__ = ["compare", "run", "write_random_head"]

_WORDS = ("What is it?", "Describe it in detail.", "Repeat after me: one two three one two three one two three.")
#: Tokens that a random head may guess, out of the vocabulary.
_GUESSABLE = 512
#: The server without a draft.
_PLAIN = "none"
_COUNTED = ("drafts", "guessed", "accepted")
_KV_GIB = 0.5


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
    layers = int(text["num_hidden_layers"])
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
        # vLLM's own, which need a model that is deep enough to have three
        "eagle_aux_hidden_state_layer_ids": [2, layers // 2, layers - 3] if layers > 9 else [1, 2, 3],
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


def _questions(settings: DraftSettings) -> Iterator[tuple[list[dict[str, Any]], int]]:
    """Yield each question's content, and its number."""
    from serve.http.images import image_url

    image = {"type": "image_url", "image_url": {"url": image_url(settings.image)}}
    for number in range(settings.questions):
        words = {"type": "text", "text": f"{_WORDS[number // 2 % len(_WORDS)]} ({number})"}
        yield [*([image] if number % 2 else []), words], number


def _ask(servers: Mapping[str, Server], settings: DraftSettings) -> dict[str, dict[str, Any]]:
    """Ask all servers all questions, in turns; return answers as token ids, tokens/s, and what each server counted."""
    import httpx

    from bench.machine.server_metrics import ServerPoint, parse

    answers: dict[str, list[list[int]]] = {name: [] for name in servers}
    took = dict.fromkeys(servers, 0.0)
    with ExitStack() as stack:
        clients = {
            name: stack.enter_context(httpx.Client(base_url=server.url, timeout=300, trust_env=False))
            for name, server in servers.items()
        }
        before = {name: parse(client.get("/metrics").text) for name, client in clients.items()}
        for content, number in _questions(settings):
            for name in list(servers)[number % len(servers) :] + list(servers)[: number % len(servers)]:
                body = {
                    "model": servers[name].model_name,
                    "messages": [{"role": "user", "content": content}],
                    "temperature": 0,
                    "max_tokens": settings.output_tokens,
                    "ignore_eos": True,
                    "return_token_ids": True,
                }
                began = time.perf_counter()
                response = clients[name].post("/v1/chat/completions", json=body).raise_for_status()
                took[name] += time.perf_counter() - began
                answers[name].append(response.json()["choices"][0]["token_ids"])
        points = {
            name: ServerPoint.between(before[name], parse(client.get("/metrics").text))
            for name, client in clients.items()
        }
    return {
        name: {
            "answers": given,
            "tokens_per_s": round(sum(map(len, given)) / took[name], 2),
            **{key: getattr(points[name], key) for key in _COUNTED if points[name] is not None},
        }
        for name, given in answers.items()
    }


def compare(plain: list[list[int]], other: list[list[int]]) -> dict[str, Any]:
    """Return how many answers are equal, and after how many tokens the others part from the plain ones."""
    parts = [
        next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
        for one, two in zip(plain, other, strict=True)
        if one != two
    ]
    return {"equal": len(plain) - len(parts), "of": len(plain), "part_after": sorted(parts)}


def run(model: str, settings: DraftSettings) -> None:
    """Boot all servers, ask them, stop them; write drafts.json.

    Args:
        model: directory, hub id or ``demo``.
        settings: where to, and how much is asked.

    Raises:
        BenchError: the server without a draft does not start.
    """
    from bench.machine.environment import gpu_names, versions
    from bench.run.boot import free_ports
    from serve.plan.tuned import tuned
    from serve.settings.config import ServerConfig
    from serve.settings.draft import NGRAM
    from toolkit.checkpoint.checkpoint import Checkpoint
    from toolkit.console import note
    from toolkit.sources.directory import resolve

    settings.out.mkdir(parents=True, exist_ok=True)
    checkpoint = Checkpoint.open(resolve(model))
    drafts: dict[str, str | None] = {_PLAIN: None, NGRAM: NGRAM}
    with ExitStack() as stack:
        if checkpoint.family.eagle:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="qvl-head-"))
            drafts["eagle3"] = str(settings.head or write_random_head(checkpoint, Path(scratch)))
        starts = {}
        for (name, draft), port in zip(drafts.items(), free_ports(len(drafts)), strict=True):
            options = ServerConfig(
                port=port,
                draft=draft,
                max_model_len=2048,
                images_per_request=1,
                probe_every=3600,
            )
            starts[name] = (model, beside_others(checkpoint.path, tuned(model, options, note), _KV_GIB))
        servers = stack.enter_context(all_up(starts))
        running = {name: server for name, server in servers.items() if not isinstance(server, QvlError)}
        found: dict[str, Any] = {
            name: {"why_not": str(error)} for name, error in servers.items() if isinstance(error, QvlError)
        }
        if _PLAIN not in running:
            raise BenchError(f"the server without a draft does not start: {found[_PLAIN]['why_not']}")
        found |= _ask(running, settings)
    for name in running.keys() - {_PLAIN}:
        found[name] |= compare(found[_PLAIN]["answers"], found[name]["answers"])
    report = {"model": Path(model).name, "gpus": gpu_names(), "versions": versions(), "drafts": found}
    (settings.out / "drafts.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, each in found.items():
        note(f"{name}: " + ", ".join(f"{key} {value}" for key, value in each.items() if key != "answers"))
