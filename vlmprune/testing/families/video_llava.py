# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA: square pictures and clips, each with the [CLS] token in front."""

from __future__ import annotations

from typing import Any

from . import llava
from .base import Family
from .layouts import Layout
from .shared import EDGE, GRID, SQUARE, VIDEO_ID, image_processor
from .vipllava import NEEDS_CLS


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return llava.config(tower, text, layers, overrides) | {"video_token_index": VIDEO_ID}


def processor(tower: str) -> dict[str, Any]:
    return llava.processed(image_processor("VideoLlava", size=EDGE, crop_size=SQUARE), tower)


FAMILY = Family(
    "video_llava",
    "VideoLlava",
    Layout(video=(GRID**2 + 1, 0)),  # a frame of a clip keeps its [CLS]
    (("clip", "llama"),),
    config,
    processor,
    refused={"siglip": NEEDS_CLS},
)
