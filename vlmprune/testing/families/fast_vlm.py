# SPDX-License-Identifier: Apache-2.0
"""FastVLM: a hybrid tower of timm, which must be installed."""

from __future__ import annotations

from typing import Any

import transformers

from .base import OWN, Family, text_config
from .layouts import Layout
from .shared import GRID, IMAGE_ID


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    # two heads, 32 pixels to a token
    sizes = {"layers": [1, 1, 1, 2], "embed_dims": [8, 8, 16, 64], "inference_mode": True}
    fields: dict[str, Any] = {"hidden_size": 128, "do_pooling": True}
    return {
        "vision_config": transformers.TimmWrapperConfig(
            architecture="fastvit_mci0", model_args=sizes, **fields
        ),
        "text_config": text_config(text, layers, overrides),
        "image_token_index": IMAGE_ID,
        "image_seq_length": GRID**2,
    }


FAMILY = Family("fast_vlm", "FastVlm", Layout(patch_size=32), (("own", "qwen2"),), config, towers=OWN)
