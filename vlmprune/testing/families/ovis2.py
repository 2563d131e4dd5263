# SPDX-License-Identifier: Apache-2.0
"""Ovis2: tokens are mixtures of visual words; marks stand around pictures."""

from __future__ import annotations

from typing import Any

import transformers

from .base import OWN, VISION, Family, text_config
from .layouts import Layout, Size
from .shared import EOS_ID, IMAGE_ID, IMAGE_SIZE, MERGE, PATCH_SIZE, VIDEO_ID

_WORDS = 48  # of the visual vocabulary
_MARKS = [EOS_ID, VIDEO_ID]  # in front of a picture and behind it


class Marked(Layout):
    """Marks stand around every picture; the model gives them embeddings where a call has any picture."""

    def block(self, size: Size, alone: bool) -> list[int]:
        return [_MARKS[0], *super().block(size, alone), _MARKS[1]]


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    vision = transformers.Ovis2VisionConfig(
        **VISION,
        image_size=IMAGE_SIZE * MERGE,
        patch_size=PATCH_SIZE,
        vocab_size=_WORDS,
        hidden_stride=MERGE,
        num_visual_indicator_tokens=2,
    )
    made = text_config(text, layers, overrides)
    return {
        "vision_config": vision,
        "text_config": made,
        "image_token_id": IMAGE_ID,
        "visual_indicator_token_ids": _MARKS,
        "vocab_size": made.vocab_size,
        "hidden_size": made.hidden_size,
        "tie_word_embeddings": False,
    }


FAMILIES = (Family("ovis2", "Ovis2", Marked(MERGE), (("own", "qwen2"),), config, towers=OWN),)
