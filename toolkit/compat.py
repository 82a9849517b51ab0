"""Makes an installation whose parts do not quite fit each other work: what is built for CUDA beside a CPU torch.

PyPI's torchvision wheels are CUDA builds. Beside a CPU torch their compiled half cannot be loaded, and even
`import torchvision` fails ("operator torchvision::nms does not exist"), which takes transformers' Qwen2-VL video
processor and qwen-vl-utils with it. PyTorch's own index has CPU builds, which need none of this.
Upstream, closed: https://github.com/pytorch/vision/issues/9085

torchaudio and torchcodec, which vLLM's CPU build asks for, come from PyPI as CUDA builds too, and transformers imports
them where it finds them. Nothing here hears or reads video with them: they are hidden.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

__all__ = ["hide_unusable", "patch_torchvision"]

#: Operators that torchvision's Python half looks up while it is imported, with the schemas of torchvision/csrc/ops.
#: Only the schemas are needed: nothing that Qwen2-VL calls runs the kernels.
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
#: Packages that a Qwen2-VL never calls, whose CUDA builds raise OSError when they are imported beside a CPU torch.
_UNUSED = ("torchaudio", "torchcodec")
#: Definitions live as long as their library object does.
_libraries: list[Any] = []


def hide_unusable() -> list[str]:
    """Let Python not find torchaudio and torchcodec where they are CUDA builds beside a CPU torch. Idempotent.

    Returns:
        What is hidden: it can't be found (`importlib.util.find_spec`) or imported in this process any more.
    """
    if not _version("torch").endswith("+cpu"):
        return []
    hidden = [name for name in _UNUSED if (version := _version(name)) and not version.endswith("+cpu")]
    for name in hidden:
        # What import.c and find_spec take for a module that is not there; one that is loaded already works.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    return hidden


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def patch_torchvision() -> bool:
    """Let `import torchvision` succeed where its compiled operators cannot be loaded. Idempotent.

    What can't be used at all is hidden on the way (`hide_unusable`).

    Call it before anything imports torchvision. It does nothing where torchvision is absent or works as installed.

    Returns:
        Whether the operators' schemas had to be defined, by this call or an earlier one.
    """
    hide_unusable()
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
