"""What vLLM is told of the settings that a profile holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from serve.settings.engine import KERNELS, EngineSettings
from tests.support.paths import ROOT

ALL = EngineSettings(
    kernel="marlin",
    cudagraph_sizes=(1, 2, 4),
    cudagraph_mode="FULL_AND_PIECEWISE",
    passes=("fuse_norm_quant",),
    performance_mode="interactivity",
    max_num_batched_tokens=4096,
    max_pixels=1003520,
    prefix_caching=False,
    mm_cache_gb=2,
    kv_cache_dtype="fp8",
    async_scheduling=True,
    ngram=3,
)


def test_nothing_set_is_nothing_said() -> None:
    assert EngineSettings().arguments() == [] and EngineSettings().environment({"A": "1"}) == {"A": "1"}


def test_the_users_flags_count() -> None:
    given = ["--max-num-batched-tokens", "8", "--no-enable-prefix-caching", "--kv-cache-dtype=auto"]
    words = ALL.arguments(given)
    assert "--max-num-batched-tokens" not in words and "--kv-cache-dtype" not in words
    assert not [word for word in words if "prefix" in word]
    assert "--compilation-config" not in ALL.arguments(["--enforce-eager"])


def test_the_kernels_passed_over() -> None:
    assert ALL.environment({})["VLLM_DISABLED_KERNELS"] == "MacheteLinearKernel"
    assert ALL.environment({"VLLM_DISABLED_KERNELS": "X"})["VLLM_DISABLED_KERNELS"] == "X"
    assert EngineSettings(kernel="machete").environment({}) == {}


@pytest.mark.slow
def test_the_installed_vllm_takes_them() -> None:
    """Its own parser reads every flag, and its list of kernels has them in the order that is assumed here."""
    code = (
        "import sys, json\n"
        "from serve.app.server import answer_for_vllm; answer_for_vllm()\n"
        "from toolkit.compat import patch_torchvision; patch_torchvision()\n"
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())\n"
        "args = AsyncEngineArgs.from_cli_args(parser.parse_args(json.loads(sys.argv[1])))\n"
        "assert args.compilation_config.cudagraph_capture_sizes == [1, 2, 4], args.compilation_config\n"
        "assert args.compilation_config.pass_config.fuse_norm_quant is True\n"
        "assert args.enable_prefix_caching is False and args.async_scheduling is True\n"
        "assert args.speculative_config['method'] == 'ngram'\n"
        "from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS, PlatformEnum\n"
        "print(json.dumps([kernel.__name__ for kernel in _POSSIBLE_KERNELS[PlatformEnum.CUDA]]))\n"
    )
    root = ROOT
    command = [sys.executable, "-c", code, json.dumps(ALL.arguments())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    order = [n for n in json.loads(done.stdout.splitlines()[-1]) if n not in ("CutlassW4A8LinearKernel",)]
    order.remove("ExllamaLinearKernel")
    for names in KERNELS.values():
        assert list(names) == order[: len(names)]
