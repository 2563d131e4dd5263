# SPDX-License-Identifier: Apache-2.0
"""LLaVA 1.5: one square crop per picture."""

from __future__ import annotations

from typing import Any

from .base import Family, text_config, vision_config
from .layouts import Layout
from .shared import EDGE, IMAGE_ID, PATCH_SIZE, SQUARE, image_processor


def fields_of(tower: str) -> dict[str, Any]:
    """What the configs of LLaVA and its children say of features."""
    return {
        "image_token_index": IMAGE_ID,
        "vision_feature_layer": -2,  # the last but one, as released
        "vision_feature_select_strategy": strategy_of(tower),
    }


def strategy_of(tower: str) -> str:
    return "default" if tower == "clip" else "full"  # a [CLS] token is dropped


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    parts = {"vision_config": vision_config(tower), "text_config": text_config(text, layers, overrides)}
    return parts | fields_of(tower)


def processor(tower: str) -> dict[str, Any]:
    clip = image_processor("CLIP", size=EDGE, crop_size=SQUARE)
    return processed(clip if tower == "clip" else image_processor("Siglip", size=SQUARE), tower)


def processed(images: Any, tower: str) -> dict[str, Any]:
    """Arguments of the processors of LLaVA and its children."""
    return {
        "image_processor": images,
        "patch_size": PATCH_SIZE,
        "num_additional_image_tokens": int(tower == "clip"),  # [CLS], counted here and dropped by "default"
        "vision_feature_select_strategy": strategy_of(tower),
    }


FAMILY = Family(
    "llava",
    "Llava",
    Layout(),
    (
        ("clip", "llama"),
        ("clip", "mistral"),
        ("clip", "mistral_sliding"),
        ("clip", "qwen2"),
        ("siglip", "llama"),
    ),
    config,
    processor,
)
