"""Our kernel as vLLM asks for it: when it is chosen, what it declines, who takes how many rows. No GPU is needed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve.kernels.plugin import register
from serve.settings.environment import KERNELS
from toolkit.compat import patch_torchvision

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # vLLM is imported


@pytest.fixture(scope="module")
def linear() -> Any:
    """vLLM's list of kernels."""
    patch_torchvision()
    from vllm.model_executor.kernels import linear

    return linear


@pytest.fixture
def hopper(linear: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Our module, as on a Hopper card on which Humming is installed."""
    from vllm.model_executor.kernels.linear.mixed_precision import humming
    from vllm.platforms import PlatformEnum, current_platform

    cuda, backend = linear._POSSIBLE_KERNELS[PlatformEnum.CUDA], linear._LINEAR_BACKEND_KERNEL_MAP["humming"]
    kept = list(cuda), set(backend)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(humming, "has_humming", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    import serve.kernels.linear as ours

    yield ours
    cuda[:], _ = kept
    backend.clear()
    backend.update(kept[1])


def asked(inputs: int = 3584, columns: int = 4608, group_size: int = 128, **changes: Any) -> Any:
    """What vLLM asks a kernel for."""
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig
    from vllm.scalar_type import scalar_types

    given = {
        "full_weight_shape": (inputs, columns),
        "partition_weight_shape": (inputs, columns),
        "weight_type": scalar_types.uint4,
        "act_type": torch.bfloat16,
        "group_size": group_size,
        "zero_points": True,
    }
    return MPLinearLayerConfig(**(given | changes))


def test_it_is_first_and_humming_takes_what_it_declines(
    linear: Any, hopper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import PlatformEnum

    monkeypatch.setenv(KERNELS, "on")
    register()
    register()  # in every process, and more than once in some
    cuda = linear._POSSIBLE_KERNELS[PlatformEnum.CUDA]
    assert cuda.count(hopper.QvlLinearKernel) == 1
    candidates = linear._filter_kernels_by_backend("humming", cuda)
    assert [kernel.__name__ for kernel in candidates] == ["QvlLinearKernel", "HummingLinearKernel"]


def test_nobody_else_s_vllm_is_changed(linear: Any, hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import PlatformEnum

    for value in ("off", None):
        monkeypatch.delenv(KERNELS, raising=False) if value is None else monkeypatch.setenv(KERNELS, value)
        register()
    assert hopper.QvlLinearKernel not in linear._POSSIBLE_KERNELS[PlatformEnum.CUDA]


def test_what_it_takes(hopper: Any) -> None:
    for given in (asked(), asked(group_size=32), asked(act_type=torch.float16), asked(inputs=18944, columns=3584)):
        assert hopper.QvlLinearKernel.can_implement(given) == (True, None)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"zero_points": False}, "zero points"),
        ({"act_type": torch.float32}, "16-bit activations"),
        ({"group_size": 16}, "groups of 16"),
        ({"columns": 4600}, "multiples of 64 and 128"),
        ({"inputs": 3600}, "multiples of 64 and 128"),
    ],
)
def test_what_it_declines(hopper: Any, changes: dict[str, Any], why: str) -> None:
    able, reason = hopper.QvlLinearKernel.can_implement(asked(**changes))
    assert not able and why in reason


def test_other_cards_are_declined(hopper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 9))
    assert hopper.QvlLinearKernel.can_implement(asked())[1] == "qvl's kernel is made for Hopper"


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 300])
def test_few_rows_are_ours_and_more_are_hummings(hopper: Any, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Each gets the bias in the order that it wants, and writes every row."""
    weight, own, lanes = torch.ones(1), torch.full((64,), 2.0), torch.full((64,), 3.0)

    class Few:
        max_rows = 16

        def __call__(self, x: Any, weight: Any, scales: Any, zeros: Any, bias: Any, out: torch.Tensor) -> None:
            out.copy_(bias.expand(len(x), 64))

    def many(*, inputs: Any, bias: Any, outputs: torch.Tensor, **others: Any) -> None:
        outputs.copy_(bias.expand(len(inputs), 64))

    monkeypatch.setitem(hopper._kernels, "k", hopper._Kernels(Few(), weight, many))
    out = hopper._w4a16(torch.ones(rows, 128), weight, weight, weight, own, lanes, weight, "k", 64)
    assert out.shape == (rows, 64)
    assert (out == (2.0 if rows <= 16 else 3.0)).all()
    fake = hopper._fake(torch.ones(rows, 128), weight, weight, weight, own, lanes, weight, "k", 64)
    assert (fake.shape, fake.dtype) == (out.shape, out.dtype)


def test_without_a_compiler_humming_goes_on(
    hopper: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line of the log, and the layer's products are Humming's."""
    from vllm.model_executor.kernels.linear.mixed_precision.humming import HummingLinearKernel

    from toolkit.errors import ServerError

    def failing(shape: Any, sms: int) -> None:
        raise ServerError("there is no NVRTC")

    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)
    monkeypatch.setattr(hopper, "compile_for", failing)
    monkeypatch.setattr(hopper, "_kernels", {})
    monkeypatch.setattr(hopper, "_compiling", {})
    monkeypatch.setattr(HummingLinearKernel, "process_weights_after_loading", lambda self, layer: None)
    monkeypatch.setattr(HummingLinearKernel, "apply_weights", lambda self, layer, x, bias: "Humming's")
    monkeypatch.setitem(sys.modules, "humming.kernel.humming", SimpleNamespace(HummingKernel=None))
    monkeypatch.setitem(sys.modules, "humming.ops.launcher", SimpleNamespace(launch_kernel=None))
    kernel = hopper.QvlLinearKernel(asked(), "qweight", "scales", "qzeros")
    layer = torch.nn.Module()
    layer.bias = torch.nn.Parameter(torch.ones(4608))
    kernel.process_weights_after_loading(layer)
    assert "no kernel of qvl for 4608x3584/128/bfloat16 (ServerError: there is no NVRTC" in caplog.text
    assert kernel.apply_weights(layer, torch.ones(1, 3584)) == "Humming's"
    kept = layer.qvl_bias
    assert isinstance(kept, torch.Tensor) and torch.equal(kept, torch.ones(4608))
