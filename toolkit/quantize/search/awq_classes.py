"""AutoAWQ's classes, imported so that it works: torchvision mended first, no farewell message at each start."""

from __future__ import annotations

import warnings

from toolkit.compat import patch_torchvision

patch_torchvision()
# recorded, not filtered: something in the import chain puts the default filters back
with warnings.catch_warnings(record=True):
    from awq.models.qwen2vl import Qwen2VLAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer

__all__ = ["AwqQuantizer", "Qwen2VLAWQForCausalLM"]
