# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: tiles, a token for four patches, and features that every layer of the decoder adds."""

from __future__ import annotations

from typing import Any

import transformers

from .base import OWN, VISION, Family, text_fields
from .layouts import Tiled
from .llava import fields_of
from .llava_next import PINPOINTS
from .shared import IMAGE_SIZE, PATCH_SIZE


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    # the config gives the queries a head for each 64 channels of the tower
    vision = VISION | {"hidden_size": 64, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE // 2}
    siglip = transformers.SiglipVisionConfig(**vision, vision_use_head=False)
    return fields_of(tower) | {
        "vision_config": siglip if tower == "siglip" else transformers.CLIPVisionConfig(**vision),
        "text_config": text_fields(layers) | {"attention_multiplier": 0.3} | overrides,
        "image_grid_pinpoints": PINPOINTS,
        "downsample_rate": "2/4",  # 2 x 2 tokens of a window of 4 x 4 patches
        "deepstack_layer_map": [[-3, 2], [-1, 0]],  # (layer of the tower, layer of the decoder)
        "spatial_target_layers": [1, 3],
        # with SigLIP, as released, it follows the tower
        "qformer_config": None if tower == "siglip" else {"intermediate_size": 64},
        "tie_word_embeddings": False,
    }


FAMILIES = (
    Family(
        "granite4_vision",
        "Granite4Vision",
        Tiled(PINPOINTS),
        (("clip", "own"),),
        config,
        texts=OWN,
        reads_tower=False,
    ),
)
