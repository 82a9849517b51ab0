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
    encoder_graphs=True,
    passes=("fuse_norm_quant",),
    performance_mode="interactivity",
    max_num_batched_tokens=4096,
    max_pixels=1003520,
    prefix_caching=False,
    mm_cache_gb=2,
    mm_cache_type="shm",
    kv_cache_dtype="fp8",
    async_scheduling=True,
    ngram=3,
)


def test_nothing_set_is_nothing_said() -> None:
    assert EngineSettings().arguments() == []


def test_the_users_flags_count() -> None:
    given = ["--max-num-batched-tokens", "8", "--no-enable-prefix-caching", "--kv-cache-dtype=auto"]
    words = ALL.arguments(given)
    assert "--max-num-batched-tokens" not in words and "--kv-cache-dtype" not in words
    assert not [word for word in words if "prefix" in word]
    assert "--compilation-config" not in ALL.arguments(["--enforce-eager"])


def test_the_kernel_is_named() -> None:
    assert EngineSettings(kernel="humming").arguments() == ["--linear-backend", "humming"]
    assert EngineSettings(kernel="humming").arguments(["--linear-backend=marlin"]) == []
    # what our kernel declines, vLLM gives to Humming
    assert EngineSettings(kernel="qvl").arguments() == ["--linear-backend", "humming"]


def test_guesses_are_made_on_the_host_or_on_the_gpu() -> None:
    for settings, method in ((EngineSettings(ngram=3), "ngram"), (EngineSettings(ngram_gpu=3), "ngram_gpu")):
        flag, value = settings.arguments()
        assert flag == "--speculative-config"
        assert json.loads(value) == {
            "method": method, "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2
        }  # fmt: skip


@pytest.mark.slow
def test_the_installed_vllm_takes_them() -> None:
    """Its own parser reads every flag, and its list of kernels has those named here, in the order that is assumed."""
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
        "assert args.compilation_config.cudagraph_mm_encoder is True\n"
        "assert args.linear_backend == 'marlin' and args.mm_processor_cache_type == 'shm'\n"
        "from vllm.model_executor.kernels import linear\n"
        "cuda = linear._POSSIBLE_KERNELS[linear.PlatformEnum.CUDA]\n"
        "named = {name: [k.__name__ for k in linear._filter_kernels_by_backend(name, cuda)] for name in sys.argv[2:]}\n"
        "print(json.dumps([named, [kernel.__name__ for kernel in linear.prioritize_humming(cuda, 90)]]))\n"
    )
    root = ROOT
    theirs = [name for name in KERNELS if name != "qvl"]
    command = [sys.executable, "-c", code, json.dumps(ALL.arguments()), *theirs]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    named, order = json.loads(done.stdout.splitlines()[-1])
    kernels = [cls for (cls,) in named.values()]  # one a name
    assert [name.lower().removesuffix("linearkernel").removesuffix("w4a16") for name in kernels] == theirs
    assert [cls for cls in order if cls in kernels] == kernels  # tried on Hopper in this order
