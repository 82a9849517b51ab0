from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from PIL import Image

def fetch_image(ele: Mapping[str, Any], image_patch_size: int = 14) -> Image.Image: ...

# as called here: frames come with their metadata; None where there is no image, no video
def process_vision_info(
    conversations: Sequence[Mapping[str, Any]],
    return_video_kwargs: Literal[True],
    return_video_metadata: Literal[True],
    image_patch_size: int = 14,
) -> tuple[list[Image.Image] | None, list[tuple[torch.Tensor, dict[str, Any]]] | None, dict[str, Any]]: ...
