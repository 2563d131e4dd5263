# SPDX-License-Identifier: Apache-2.0
"""Janus and DeepSeek-VL: one square crop per image."""

from __future__ import annotations

from typing import Any

from .base import OWN, VISION, Family, text_config, vision_config
from .layouts import Layout
from .shared import IMAGE_ID, IMAGE_SIZE, PATCH_SIZE

_DRAWING: dict[str, Any] = {  # the part that draws, which no test asks for
    "embed_dim": 4,
    "num_embeddings": 8,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "num_patches": 4,
    "projection_dim": 64,
    "image_token_embed_dim": 64,
}


def janus(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    vision = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    # Janus has mlp_ratio in place of intermediate_size
    vision |= {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "mlp_ratio": 2, "projection_dim": 64}
    return {
        "vision_config": vision,
        "vq_config": _DRAWING,
        "text_config": text_config(text, layers, overrides),
        "image_token_id": IMAGE_ID,
        "tie_word_embeddings": False,
    }


def deepseek(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": vision_config(tower),
        "text_config": text_config(text, layers, overrides),
        "image_token_id": IMAGE_ID,
        "tie_word_embeddings": False,
    }


FAMILIES = (
    Family("janus", "Janus", Layout(), (("own", "llama"),), janus, towers=OWN),
    Family("deepseek_vl", "DeepseekVL", Layout(), (("siglip", "llama"),), deepseek, towers=("siglip",)),
)
