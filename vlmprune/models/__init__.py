# SPDX-License-Identifier: Apache-2.0
"""One adapter per model family; ``adapter_for(model)`` finds the right one."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from inspect import signature
from typing import Any

from torch import nn

from ..errors import UnsupportedError, did_you_mean
from .base import Adapter

_ADAPTERS = {
    "llava": "llava:LlavaAdapter",
    "vipllava": "llava:VipLlavaAdapter",
    "llava_next": "llava_next:LlavaNextAdapter",
    "llava_next_video": "llava_video:LlavaNextVideoAdapter",
    "llava_onevision": "llava_onevision:LlavaOnevisionAdapter",
    "video_llava": "llava_video:VideoLlavaAdapter",
    "internvl": "internvl:InternVLAdapter",
    "qwen2_vl": "qwen_vl:Qwen2VLAdapter",
    "qwen2_5_vl": "qwen_vl:Qwen2_5VLAdapter",
    "qwen3_vl": "qwen_vl:Qwen3VLAdapter",
    "idefics3": "idefics3:Idefics3Adapter",
    "fast_vlm": "fast_vlm:FastVlmAdapter",
    "smolvlm": "idefics3:SmolVLMAdapter",
    "paligemma": "gemma:PaliGemmaAdapter",
    "gemma3": "gemma:Gemma3Adapter",
}
# families that were never tried where generate does not encode pictures by itself, which is before transformers 5.20
_RECENT = set(_ADAPTERS) - {"llava", "vipllava", "llava_next", "llava_onevision"}
# families that are known and cannot be cut, and why
_REFUSED = {
    "mllama": "its pictures are read by cross-attention and are no tokens of the sequence",
    "florence2": "it is an encoder-decoder, whose pictures go through the encoder",
}


def families() -> list[str]:
    """Model types (as in HF configs) that have an adapter."""
    return sorted(_ADAPTERS)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside what torch.compile and PEFT put around it: that is where ``generate`` runs."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def adapter_for(model: Any) -> Adapter:
    """The adapter of a model, wrappers of PEFT and torch.compile taken off; raises for what cannot be pruned right."""
    if not isinstance(model, nn.Module):
        raise UnsupportedError(
            f"expected a loaded transformers model, got {type(model).__name__}; load it first with from_pretrained"
        )
    if isinstance(model, nn.DataParallel):
        raise UnsupportedError(
            "nn.DataParallel copies the model, hooks stay with the original; use one process per device instead"
        )
    model = unwrap(model)
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedError(
            f"{type(model).__name__} (model type {model_type!r}) has no vision tower; "
            f"supported families: {families()}"
        )
    if model_type in _REFUSED:
        raise UnsupportedError(
            f"model type {model_type!r} is not supported: {_REFUSED[model_type]}. Run it dense, choose tokens of tensors of your "
            f"own with vlmprune.select, or use one of {families()}"
        )
    if model_type not in _ADAPTERS:
        raise UnsupportedError(
            f"model type {model_type!r} is not supported; "
            f"families with an adapter: {families()}.{did_you_mean(model_type, _ADAPTERS)}"
        )
    module, name = _ADAPTERS[model_type].split(":")
    adapter = getattr(import_module(f".{module}", __name__), name)
    if not hasattr(model, "generate") or not hasattr(getattr(model, "model", None), adapter.text):
        raise UnsupportedError(
            f"{type(model).__name__} is a part of a {model_type} model; attach to the whole ...ForConditionalGeneration"
        )
    if too_old(model_type, type(model)):
        here = version("transformers")
        raise UnsupportedError(f"{model_type} needs a newer transformers than {here}; install the newest")
    return adapter(model)


def too_old(model_type: str, model_class: type) -> bool:
    """Whether the class of a model is of a transformers version that its family was not tried with."""
    known = signature(model_class.forward).parameters  # Video-LLaVA has called its pixels so since transformers 5.23
    return model_type in _RECENT and not {"mm_encoder_outputs", "pixel_values"} <= set(known)
