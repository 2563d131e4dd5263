# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 and ShieldGemma 2: the tokens of one image attend both ways; patches are averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .base import Family, text_config, vision_config
from .layouts import Typed
from .shared import GRID, IMAGE_ID, MERGE


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": vision_config(tower, MERGE),
        "text_config": text_config(text, layers, overrides),
        "image_token_index": IMAGE_ID,
        "mm_tokens_per_image": GRID**2,
        "tie_word_embeddings": False,
    }


FAMILY = Family(
    "gemma3",
    "Gemma3",
    Typed(MERGE, whole=False),
    (("siglip", "gemma3"), ("siglip", "gemma3_sliding")),
    config,
    towers=("siglip",),
    texts=("gemma3", "gemma3_sliding"),
)
SHIELD = replace(FAMILY, name="shieldgemma2", config_prefix="ShieldGemma2", variants=FAMILY.variants[:1])
