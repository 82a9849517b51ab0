"""The installed vLLM takes what a profile holds."""

from __future__ import annotations

import json

import pytest

from serve.settings.engine import KERNELS
from tests.support.zygote import Zygote
from tests.unit.serve.settings.test_engine import ALL
from toolkit.paths import demo_checkpoint

pytestmark = pytest.mark.e2e


def test_the_installed_vllm_takes_them(zygote: Zygote) -> None:
    """Its own parser reads every flag, and its list of kernels has those named here, in the order that is assumed."""
    code = (
        "import sys, json\n"
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
    theirs = [name for name in KERNELS if name != "qvl"]
    said = zygote.run(code, json.dumps(["--model", str(demo_checkpoint()), *ALL.arguments()]), *theirs)
    named, order = json.loads(said.splitlines()[-1])
    kernels = [cls for (cls,) in named.values()]  # one a name
    assert [name.lower().removesuffix("linearkernel").removesuffix("w4a16") for name in kernels] == theirs
    assert [cls for cls in order if cls in kernels] == kernels  # tried on Hopper in this order
