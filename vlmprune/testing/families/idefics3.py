# SPDX-License-Identifier: Apache-2.0
"""Idefics3: rows of pictures, filled up with pictures of zeros."""

from __future__ import annotations

from typing import Any

import transformers

from .base import OWN, VISION, Family, text_config
from .layouts import Nested
from .shared import IMAGE_ID, IMAGE_SIZE, MERGE, PAD_ID, PATCH_SIZE


def idefics(prefix: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config, with the tower of the family of that prefix."""
    tower = getattr(transformers, prefix + "VisionConfig")
    return {
        "vision_config": tower(**VISION, image_size=IMAGE_SIZE * MERGE, patch_size=PATCH_SIZE),
        "text_config": text_config(text, layers, overrides),
        "image_token_id": IMAGE_ID,
        "scale_factor": MERGE,
        "pad_token_id": PAD_ID,
    }


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return idefics("Idefics3", text, layers, overrides)


FAMILY = Family("idefics3", "Idefics3", Nested(MERGE), (("own", "llama"),), config, towers=OWN)
