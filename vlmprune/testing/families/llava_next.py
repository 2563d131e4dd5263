# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: an overview, and tiles of one of five canvases."""

from __future__ import annotations

from typing import Any

from . import llava
from .base import Family
from .layouts import Tiled
from .shared import EDGE, SQUARE, image_processor

# (height, width) of 1 x 2, 2 x 1, 2 x 2, 3 x 1 and 1 x 3 crops
PINPOINTS = [[84, 168], [168, 84], [168, 168], [252, 84], [84, 252]]


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return llava.config(tower, text, layers, overrides) | {"image_grid_pinpoints": PINPOINTS}


def processor(tower: str) -> dict[str, Any]:
    sizes = {"size": EDGE, "crop_size": SQUARE, "image_grid_pinpoints": PINPOINTS}
    return llava.processed(image_processor("LlavaNext", **sizes), tower)


FAMILY = Family(
    "llava_next",
    "LlavaNext",
    Tiled(PINPOINTS),
    (("clip", "llama"), ("clip", "mistral"), ("siglip", "qwen2")),
    config,
    processor,
)
