"""Gradients through all layers of a written model, a layer at a time: those of autograd through all at once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from tests.support import chats
from toolkit.checkpoint.checkpoint import Checkpoint
from toolkit.formats.packing import named, pack_as
from toolkit.models.families import FAMILIES
from toolkit.quantize.distillation.layers import Student, learning_layer
from toolkit.quantize.parts import Parts, write_layer
from toolkit.quantize.recipe import Recipe
from toolkit.quantize.replay import written_layer
from toolkit.quantize.search.grid import round_to_grid
from toolkit.quantize.stream.layers import StreamedLayers
from toolkit.quantize.stream.shell import embed, load_shell
from toolkit.quantize.stream.states import Batch, States
from toolkit.sources.random_model import write_random_model

CPU = torch.device("cpu")
RECIPE = Recipe(group_size=32)


def write_nearest(checkpoint: Checkpoint, directory: Path, left: str = "") -> None:
    """Write all layers rounded to nearest; ``left``: a linear of the first layer that stays in 16 bits."""
    for index in range(checkpoint.num_layers):
        prefix = checkpoint.layer_prefix(index)
        tensors = {n: checkpoint.get(n) for n in checkpoint.tensors if n.startswith(prefix)}
        for name in checkpoint.family.linears:
            if index == 0 and name == left:
                continue
            weight = tensors.pop(f"{prefix}{name}.weight").float()
            tensors |= named(RECIPE.format, prefix + name, pack_as(RECIPE.format, round_to_grid(weight, 32)))
        write_layer(directory, index, tensors, {"layer": index})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_gradients_are_those_of_autograd_through_the_whole(family: object, tmp_path: Path) -> None:
    model = write_random_model(f"{family.title.lower()}-tiny", tmp_path / "model")  # type: ignore[attr-defined]
    checkpoint = Checkpoint.open(model)
    write_nearest(checkpoint, tmp_path, left="self_attn.o_proj")
    shell, config = load_shell(checkpoint, CPU)
    states = States.join(embed(shell, chats.inputs(model, tmp_path / "chats")[1:3], CPU, CPU))
    layers = StreamedLayers(checkpoint, config, CPU)
    file = Parts(tmp_path).layer_file
    learning = [
        learning_layer(layers.load(i), checkpoint, RECIPE, i, file(i), torch.float32) for i in range(len(layers))
    ]
    found = Student(learning, CPU, narrow=False)
    torch.manual_seed(0)
    above = torch.randn_like(states.hidden[0])

    kept: list[torch.Tensor] = []
    hidden = found.forward(states, kept)
    found.backward(states, kept, above)
    names = [(i, name) for i, layer in enumerate(found.learned()) for name in layer]
    gradients = [found.learned()[i][name].share.grad for i, name in names]
    assert not kept and all(gradient is not None for gradient in gradients)

    whole, batch = copy.copy(states), Batch(0, 0, sum(states.lengths), states.lengths)
    whole.hidden = states.hidden.clone()
    written = copy.copy(states)
    written.hidden = states.hidden.clone()
    for i, layer in enumerate(learning):
        output = layer(**whole.inputs(batch, CPU))
        whole.hidden = output.clone()
        whole.add()
        with torch.no_grad():
            written.hidden = written_layer(layers.load(i), checkpoint, RECIPE, i, file(i))(**written.inputs(batch, CPU))
            written.add()
    torch.testing.assert_close(hidden, written.hidden[0], rtol=1e-4, atol=1e-4)  # the layers are those of the files
    torch.testing.assert_close(hidden, whole.hidden[0].detach())
    shares = [found.learned()[i][name].share for i, name in names]
    for (i, name), gradient, true in zip(
        names, gradients, torch.autograd.grad(whole.hidden[0], shares, above), strict=True
    ):
        torch.testing.assert_close(gradient, true, rtol=1e-3, atol=1e-4 * float(true.abs().max()), msg=f"{i} {name}")
    linears = {n.removesuffix(".scales") for i, n in names if i == 0 and n.endswith(".scales")}
    assert linears == set(checkpoint.family.linears) - {"self_attn.o_proj"}
    norms = {n.removesuffix(".weight") for i, n in names if i == 1 and n.endswith(".weight")}
    assert norms == set(checkpoint.family.norms)
