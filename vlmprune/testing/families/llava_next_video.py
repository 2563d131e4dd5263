# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video: LLaVA-NeXT, and clips of square frames, pooled."""

from __future__ import annotations

from typing import Any

from . import llava_next
from .base import Family
from .layouts import Tiled
from .shared import GRID, VIDEO_ID


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return llava_next.config(tower, text, layers, overrides) | {"video_token_index": VIDEO_ID}


FAMILY = Family(
    "llava_next_video",
    "LlavaNextVideo",
    # frames are pooled 2 x 2, without newlines
    Tiled(llava_next.PINPOINTS, video=((GRID // 2) ** 2, 0)),
    (("clip", "llama"),),
    config,
    llava_next.processor,
)
