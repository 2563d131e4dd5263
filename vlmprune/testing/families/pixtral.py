# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 and LightOnOCR: pictures of any size, whose patches the projector puts together."""

from __future__ import annotations

from typing import Any

import transformers

from .base import OWN, VISION, Family, text_config
from .layouts import Sized
from .shared import IMAGE_ID, IMAGE_SIZE, MERGE, PATCH_SIZE


def pixtral() -> Any:
    """The tower."""
    fields: dict[str, Any] = {**VISION, "head_dim": 8}
    # larger than any picture here: the table of rotations ends with image_size
    return transformers.PixtralVisionConfig(**fields, image_size=IMAGE_SIZE * 4, patch_size=PATCH_SIZE)


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": pixtral(),
        "text_config": text_config(text, layers, overrides),
        "image_token_index": IMAGE_ID,
        "spatial_merge_size": MERGE,
        "tie_word_embeddings": False,
    }


def lighton(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    made = config(tower, text, layers, overrides)
    return made | {"image_token_id": made.pop("image_token_index")}


FAMILIES = (
    Family("mistral3", "Mistral3", Sized(), (("own", "mistral"), ("own", "ministral3")), config, towers=OWN),
    Family("lighton_ocr", "LightOnOcr", Sized(), (("own", "qwen3"),), lighton, towers=OWN),
)
