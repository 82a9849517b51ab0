"""AutoAWQ's classes, imported so that it works: torchvision mended first, no farewell message at each start."""

from __future__ import annotations

import warnings

from toolkit.compat import patch_torchvision

patch_torchvision()
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    from awq.models.qwen2vl import Qwen2VLAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

__all__ = ["AwqQuantizer", "Qwen2VLAWQForCausalLM"]
