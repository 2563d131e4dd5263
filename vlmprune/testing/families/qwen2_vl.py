# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL: pictures of any size in one sequence, tokens with places in them."""

from __future__ import annotations

from typing import Any

import transformers

from .base import OWN, Family, text_fields
from .layouts import Packed
from .shared import (
    BOS_ID,
    EOS_ID,
    IMAGE_ID,
    IMAGE_SIZE,
    MERGE,
    PATCH_SIZE,
    VIDEO_ID,
    image_processor,
    tiny_tokenizer,
)

OUT = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}  # of the towers of its children


def qwen(
    tower: dict[str, Any],
    layers: int,
    overrides: dict[str, Any],
    text: dict[str, Any] | None = None,
    rope: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Fields of a config, with those that one family has of its own."""
    vision = {
        "depth": 4,
        "num_heads": 4,
        "patch_size": PATCH_SIZE,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    # pairs of channels that turn by t, h and w: 2 + 3 + 3, all of a head of 16
    angles = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0} | (rope or {})
    # rope_scaling is what older transformers call it
    key = "rope_parameters" if hasattr(transformers.LlamaConfig(), "rope_parameters") else "rope_scaling"
    return {
        "vision_config": vision | tower,
        "text_config": text_fields(layers) | {key: angles} | (text or {}) | overrides,
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "vision_start_token_id": BOS_ID,
        "vision_end_token_id": EOS_ID,
    }


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    # here hidden_size is what comes out, and embed_dim the width of the tower
    return qwen({"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}, layers, overrides)


def processor(tower: str) -> dict[str, Any]:
    area = (2 * IMAGE_SIZE) ** 2  # of pixels: pictures of all shapes give about GRID x GRID tokens
    images = image_processor(
        "Qwen2VL",
        size={"shortest_edge": area // 2, "longest_edge": area + area // 9},
        patch_size=PATCH_SIZE,
        merge_size=MERGE,
    )
    tokens = {
        "image_token": "<image>",
        "video_token": "<video>",
        "vision_start_token": "<s>",
        "vision_end_token": "</s>",
    }
    return {"image_processor": images, "tokenizer": tiny_tokenizer(**tokens)}


FAMILY = Family("qwen2_vl", "Qwen2VL", Packed(), (("own", "own"),), config, processor, towers=OWN, texts=OWN)
