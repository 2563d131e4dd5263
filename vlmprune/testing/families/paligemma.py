# SPDX-License-Identifier: Apache-2.0
"""PaliGemma: the whole prompt attends both ways."""

from __future__ import annotations

from typing import Any

from .base import Family, text_config, vision_config
from .layouts import Typed
from .shared import IMAGE_ID


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": vision_config(tower),
        "text_config": text_config(text, layers, overrides),
        "image_token_index": IMAGE_ID,
        "projection_dim": 64,
        "tie_word_embeddings": False,
    }


FAMILY = Family(
    "paligemma",
    "PaliGemma",
    Typed(whole=True),
    (("siglip", "gemma"), ("siglip", "gemma2")),
    config,
    towers=("siglip",),
    texts=("gemma", "gemma2"),
)
