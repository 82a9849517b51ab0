"""The real vLLM reads answers token by token, and what it says ranks checkpoints by how damaged they are."""

from __future__ import annotations

import asyncio
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.judge.fidelity import Drift, Item, Observed, compare, items_from_questions, observe
from bench.load.endpoint import discover
from bench.questions.observe import Observing
from bench.questions.tasks import load_questions
from serve.process.lifecycle import Server
from serve.settings.config import ServerConfig
from tests.e2e.conftest import BOOT_SECONDS, Served, booted, free_port
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.tasks.manifests import write_tasks

pytestmark = [pytest.mark.e2e, pytest.mark.xdist_group("served")]

Change = Callable[[str, torch.Tensor], torch.Tensor]


def damaged(source: Path, directory: Path, change: Change) -> Path:
    """Copy a checkpoint with its tensors changed."""
    shutil.copytree(source, directory)
    for shard in directory.glob("*.safetensors"):
        save_file({name: change(name, tensor).contiguous() for name, tensor in load_file(shard).items()}, shard)
    return directory


def louder(layer: str) -> Change:
    """All scales of a layer are 5% too large."""
    return lambda name, tensor: tensor * 1.05 if name.startswith(layer) and name.endswith(".scales") else tensor


def unscaled(layer: str) -> Change:
    """The norm before attention was divided by scales, the weights after it were not multiplied by them."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name != f"{layer}input_layernorm.weight":
            return tensor
        scales = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).mul(0.5).exp()
        return (tensor.float() / scales).to(tensor.dtype)

    return change


def look(server: Server, items: list[Item], reference: Observed | None = None) -> Observed:
    async def run() -> Observed:
        return await observe(await discover(server.url), items, Observing(max_tokens=16), reference=reference)

    return asyncio.run(run())


@pytest.mark.parametrize("faults", [("unscaled",), pytest.param(("louder", "unscaled"), marks=pytest.mark.release)])
def test_drift_ranks_checkpoints_by_their_damage(
    faults: tuple[str, ...], served: Served, awq_gemm: Path, tmp_path: Path
) -> None:
    items = items_from_questions(load_questions(write_tasks(tmp_path / "tasks", per_task=2)))
    server = served("demo")
    baseline = look(server, items)
    assert baseline.missing is None
    for observation in baseline.items.values():
        assert observation.answer and observation.answer.tokens and observation.answer.prompt
        if observation.positions is None:
            # Seldom, a model splits a word otherwise than its tokenizer does.
            assert observation.failure and observation.failure.kind == "mismatch"
            continue
        assert [position.token for position in observation.positions] == list(observation.answer.tokens)
        assert all(20 <= len(position.logprobs) <= 21 for position in observation.positions)
        assert observation.positions[-1].text == "<|im_end|>"  # whether it would stop counts

    def drift(other: Observed) -> Drift:
        found = compare(items, baseline, other, top_k=20)
        assert found.missing == () and found.failed <= 1 and found.prompts_differ == 0
        assert found.candidate.scored >= len(items) - 1 and found.candidate.answered == len(items)
        assert found.candidate.greedy is not None and found.candidate.greedy > 0.98
        return found.candidate

    again = drift(look(server, items, baseline))
    awq = drift(look(served(awq_gemm), items, baseline))
    prefix = Checkpoint.open(awq_gemm).layer_prefix
    changes = {"louder": louder(prefix(0)), "unscaled": unscaled(prefix(1))}
    faulty = []
    for name in faults:
        change = changes[name]
        with booted(
            damaged(awq_gemm, tmp_path / name, change), ServerConfig(port=free_port(), timeout=BOOT_SECONDS)
        ) as bad:
            faulty.append(drift(look(bad, items, baseline)))

    means = [each.mean_kl.value for each in (again, awq, *faulty) if each.mean_kl]
    assert means == sorted(means) and len(means) == 2 + len(faults)
    assert means[0] < 1e-5 < means[1] < 5e-3
    assert all(worse > 1.5 * better for better, worse in itertools.pairwise(means[1:]))
    assert again.identical and again.identical.value > 0.98
    assert again.top1_agreement and again.top1_agreement.value > 0.98
    assert again.perplexity_ratio and again.perplexity_ratio.value == pytest.approx(1, abs=1e-4)
    # The worst percent of tokens lose probability, the more so the worse the fault.
    lowest = [each.delta_p[1].value for each in (again, awq, *faulty)]
    assert lowest == sorted(lowest, reverse=True)
