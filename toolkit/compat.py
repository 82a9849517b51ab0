"""Makes an installation whose parts do not quite fit each other work: a torchvision built for CUDA beside a CPU torch.

PyPI's torchvision wheels are CUDA builds. Beside a CPU torch their compiled half cannot be loaded, and even
`import torchvision` fails ("operator torchvision::nms does not exist"), which takes transformers' Qwen2-VL video
processor and qwen-vl-utils with it. PyTorch's own index has CPU builds, which need none of this.
Upstream, closed: https://github.com/pytorch/vision/issues/9085
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

__all__ = ["patch_torchvision"]

#: Operators that torchvision's Python half looks up while it is imported, with the schemas of torchvision/csrc/ops.
#: Only the schemas are needed: nothing that Qwen2-VL calls runs the kernels.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
#: Definitions live as long as their library object does.
_libraries: list[Any] = []


def patch_torchvision() -> bool:
    """Let `import torchvision` succeed where its compiled operators cannot be loaded. Idempotent.

    Call it before anything imports torchvision. It does nothing where torchvision is absent or works as installed.

    Returns:
        Whether the operators' schemas had to be defined, by this call or an earlier one.
    """
    if _libraries:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    import torch

    if _loads(Path(spec.origin).parent):
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _libraries.append(library)
    with warnings.catch_warnings():
        # torchvision.io warns that its image decoders are missing too; images are decoded by PIL here.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        import torchvision  # noqa: F401
    return True


def _loads(package: Path) -> bool:
    """Return whether torchvision's compiled operators load into this torch."""
    import torch

    for compiled in sorted(package.glob("_C*.so")) + sorted(package.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(compiled))
        except (OSError, ImportError):
            continue
        return True
    return False
