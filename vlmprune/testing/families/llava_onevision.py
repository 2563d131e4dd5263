# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: an overview and tiles, scaled down where they are many; overviews of several pictures."""

from __future__ import annotations

import math
from typing import Any

from . import llava
from .base import Family
from .layouts import Tiled
from .shared import GRID, SQUARE, VIDEO_ID, image_processor

# every grid of tiles, as in the released models; 4 x 4 exceeds anyres_max_9: the model scales features down
PINPOINTS = [[84 * rows, 84 * cols] for rows in range(1, 5) for cols in range(1, 5)]
ASPECT = "anyres_max_9"


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return llava.config(tower, text, layers, overrides) | {
        "vision_feature_layer": -1,
        "image_grid_pinpoints": PINPOINTS,
        "video_token_index": VIDEO_ID,
        "vision_aspect_ratio": ASPECT,
    }


def processor(tower: str) -> dict[str, Any]:
    return {
        "image_processor": image_processor("LlavaOnevision", size=SQUARE, image_grid_pinpoints=PINPOINTS),
        "num_image_tokens": GRID * GRID + (tower == "clip"),  # with [CLS]
        "vision_aspect_ratio": ASPECT,
        "vision_feature_select_strategy": llava.strategy_of(tower),
    }


FAMILY = Family(
    "llava_onevision",
    "LlavaOnevision",
    # frames are pooled 2 x 2, rounded up, and one newline ends the clip
    Tiled(PINPOINTS, video=(math.ceil(GRID / 2) ** 2, 1), one=True),
    (("siglip", "qwen2"), ("clip", "llama")),
    config,
    processor,
)
