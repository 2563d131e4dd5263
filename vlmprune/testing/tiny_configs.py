# SPDX-License-Identifier: Apache-2.0
"""Configs of the tiny models: four layers everywhere, vision towers of width 32, language models of width 64."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from ..errors import UnsupportedError
from .processors import BOS_ID, IMAGE_ID, IMAGE_SIZE, PAD_ID, PATCH_SIZE, PINPOINTS, VIDEO_ID, VOCABULARY, family_prefix

TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral_sliding": ("Mistral", {"sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
}


def tiny_config(family: str, tower: str, text: str, layers: int, overrides: dict[str, Any]) -> Any:
    """The config of a whole model."""
    return model_class(family, "Config")(
        vision_config=_vision_config(tower), text_config=_text_config(text, layers, overrides),
        image_token_index=IMAGE_ID, **_family_fields(family, tower),
    )


def model_class(family: str, suffix: str = "ForConditionalGeneration") -> Any:
    """A class of a family, or a clear error where this transformers has none."""
    name = family_prefix(family) + suffix
    found = getattr(transformers, name, None)
    if found is None:
        raise UnsupportedError(f"transformers {transformers.__version__} has no {name}; install a newer one")
    return found


def _vision_config(tower: str) -> Any:
    fields: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE,
    }
    if tower == "siglip":
        return transformers.SiglipVisionConfig(**fields, vision_use_head=False)
    return transformers.CLIPVisionConfig(**fields)


def text_fields(layers: int) -> dict[str, Any]:
    """What all language models share."""
    return {
        "vocab_size": len(VOCABULARY), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "bos_token_id": BOS_ID, "eos_token_id": None, "pad_token_id": PAD_ID,
    }


def _text_config(text: str, layers: int, overrides: dict[str, Any]) -> Any:
    prefix, special = TEXTS[text]
    return getattr(transformers, prefix + "Config")(**text_fields(layers) | special | overrides)


def _family_fields(family: str, tower: str) -> dict[str, Any]:
    if family == "vipllava":
        plural = "vision_feature_layers"  # what older transformers call it
        return {plural if plural in inspect.signature(transformers.VipLlavaConfig).parameters else plural[:-1]: [-2, -3, 1]}
    fields: dict[str, Any] = {
        "vision_feature_layer": -1 if family == "llava_onevision" else -2,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }
    if family in PINPOINTS:
        fields["image_grid_pinpoints"] = PINPOINTS[family]
    if family == "llava_onevision":
        fields |= {"video_token_index": VIDEO_ID, "vision_aspect_ratio": "anyres_max_9"}
    return fields
