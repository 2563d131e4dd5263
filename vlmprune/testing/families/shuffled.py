# SPDX-License-Identifier: Apache-2.0
"""Cohere Command A Vision, Aya Vision, LFM2-VL: patches are shuffled to tokens in the projector."""

from __future__ import annotations

from typing import Any

import transformers

from .base import OWN, VISION, Family, text_config, vision_config
from .layouts import Filled, Layout
from .shared import IMAGE_ID, MERGE, PATCH_SIZE


def cohere(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": vision_config("siglip", MERGE),
        "text_config": text_config(text, layers, overrides),
        "image_token_id": IMAGE_ID,
        "downsample_factor": MERGE,
        "alignment_intermediate_size": 96,
        "tie_word_embeddings": False,
    }


def aya(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    made = cohere(tower, text, layers, overrides)
    return made | {"image_token_index": made.pop("image_token_id"), "vision_feature_layer": -1}


def lfm2(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    # num_patches is a table of 12 x 12 places, which is resized for other pictures
    vision = transformers.Siglip2VisionConfig(
        **VISION, patch_size=PATCH_SIZE, num_patches=144, vision_use_head=False
    )
    return {
        "vision_config": vision,
        "text_config": text_config(text, layers, overrides),
        "image_token_id": IMAGE_ID,
        "projector_hidden_size": 96,
        "downsample_factor": MERGE,
        "tie_word_embeddings": False,
    }


FAMILIES = (
    Family(
        "cohere2_vision", "Cohere2Vision", Layout(MERGE), (("siglip", "cohere2"),), cohere, towers=("siglip",)
    ),
    Family("aya_vision", "AyaVision", Layout(MERGE), (("siglip", "cohere2"),), aya, towers=("siglip",)),
    Family("lfm2_vl", "Lfm2Vl", Filled(), (("own", "lfm2"),), lfm2, towers=OWN, hybrid=True),
)
