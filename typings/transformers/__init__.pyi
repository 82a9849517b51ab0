from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

__version__: str

class PreTrainedConfig:
    _attn_implementation: str | None
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Self: ...

class Qwen2VLTextConfig(PreTrainedConfig):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    layer_types: list[str]

class Qwen2VLConfig(PreTrainedConfig):
    tie_word_embeddings: bool
    text_config: Qwen2VLTextConfig
    image_token_id: int
    video_token_id: int

class PreTrainedModel(nn.Module):
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

class AttentionInterface:
    @classmethod
    def register(cls, key: str, value: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]) -> None: ...

# --- Qwen2-VL -----------------------------------------------------------------------------------------------------

class _PatchEmbed(nn.Module):
    proj: nn.Conv3d

class _VisionTower(PreTrainedModel):
    @property
    def patch_embed(self) -> _PatchEmbed: ...
    @patch_embed.setter
    def patch_embed(self, module: nn.Module) -> None: ...
    forward: Callable[..., BaseModelOutputWithPooling]

class Qwen2VLTextModel(PreTrainedModel):
    embed_tokens: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: nn.Module

class Qwen2VLModel(PreTrainedModel):
    visual: _VisionTower
    language_model: Qwen2VLTextModel

class _Output:
    logits: torch.Tensor

class Qwen2VLForConditionalGeneration(PreTrainedModel):
    config: Qwen2VLConfig
    model: Qwen2VLModel
    lm_head: nn.Linear
    def __init__(self, config: Qwen2VLConfig) -> None: ...
    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        use_cache: bool | None = None,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
    ) -> _Output: ...
    def generate(
        self,
        *,
        max_new_tokens: int,
        do_sample: bool,
        **inputs: torch.Tensor,
    ) -> torch.Tensor: ...

# --- what turns chats into inputs ---------------------------------------------------------------------------------

class BatchFeature(UserDict[str, torch.Tensor]):
    def to(self, device: torch.device | str) -> Self: ...

class BatchEncoding(UserDict[str, list[int]]): ...

class PreTrainedTokenizerBase:
    chat_template: str | dict[str, str] | None
    def __call__(self, text: str) -> BatchEncoding: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def convert_tokens_to_ids(self, tokens: str) -> int: ...
    def get_vocab(self) -> dict[str, int]: ...

class Qwen2VLImageProcessor:
    size: Mapping[str, int]
    patch_size: int
    merge_size: int
    def __call__(
        self,
        images: Sequence[Image.Image],
        *,
        do_resize: bool = ...,
        size: Mapping[str, int] = ...,
        return_tensors: Literal["pt"] = ...,
    ) -> BatchFeature: ...

class Qwen2VLProcessor:
    tokenizer: PreTrainedTokenizerBase
    image_processor: Qwen2VLImageProcessor
    chat_template: str | dict[str, str] | None
    def __call__(
        self,
        images: Sequence[Image.Image] | None = None,
        text: Sequence[str] = ...,
        videos: Sequence[Any] | None = None,
        *,
        padding: bool = ...,
        return_tensors: Literal["pt"] = ...,
        do_resize: bool = ...,
        do_sample_frames: bool = ...,
        video_metadata: Sequence[Any] = ...,
    ) -> BatchFeature: ...
    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        chat_template: str | None = ...,
        *,
        add_generation_prompt: bool = ...,
        tokenize: Literal[False],
    ) -> str: ...
    def batch_decode(self, token_ids: torch.Tensor, *, skip_special_tokens: bool = ...) -> list[str]: ...

# --- by what a directory holds ------------------------------------------------------------------------------------

class AutoConfig:
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str]) -> Qwen2VLConfig: ...

class AutoTokenizer:
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str]) -> PreTrainedTokenizerBase: ...

class AutoProcessor:
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike[str]) -> Qwen2VLProcessor: ...

class AutoModelForImageTextToText:
    @classmethod
    def from_config(cls, config: Qwen2VLConfig) -> Qwen2VLForConditionalGeneration: ...
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        dtype: torch.dtype | Literal["auto"],
        device_map: Mapping[str, str] = ...,
    ) -> Qwen2VLForConditionalGeneration: ...
