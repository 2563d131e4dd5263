# SPDX-License-Identifier: Apache-2.0
"""InternVL and Qianfan-OCR: square tiles, shuffled patches."""

from __future__ import annotations

from typing import Any

import transformers

from .base import OWN, VISION, Family, text_config
from .layouts import Layout
from .shared import GRID, IMAGE_ID, IMAGE_SIZE, MERGE, PATCH_SIZE, image_processor, tiny_tokenizer

SIDE = IMAGE_SIZE * MERGE  # pixels: GRID x GRID tokens of MERGE x MERGE patches


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    vision = transformers.InternVLVisionConfig(
        **VISION,
        image_size=[SIDE, SIDE],
        patch_size=[PATCH_SIZE, PATCH_SIZE],
        use_qk_norm=True,
        norm_type="rms_norm",
    )
    return {
        "vision_config": vision,
        "text_config": text_config(text, layers, overrides),
        "image_token_id": IMAGE_ID,
        "downsample_ratio": 1 / MERGE,  # of each side
    }


def processor(tower: str) -> dict[str, Any]:
    size = {"height": SIDE, "width": SIDE}
    images = image_processor("GotOcr2", size=size, crop_to_patches=True, min_patches=1, max_patches=3)
    tokens = {
        "start_image_token": "<s>",
        "end_image_token": "</s>",
        "context_image_token": "<image>",
        "video_token": "<video>",
    }
    return {"image_processor": images, "image_seq_length": GRID * GRID, "tokenizer": tiny_tokenizer(**tokens)}


def qianfan(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH_SIZE, PATCH_SIZE]}
    made = config(tower, text, layers, overrides)
    return made | {"vision_config": vision, "tie_word_embeddings": False}


FAMILY = Family("internvl", "InternVL", Layout(MERGE), (("own", "qwen2"),), config, processor, towers=OWN)
QIANFAN = Family("qianfan_ocr", "QianfanOCR", Layout(MERGE), (("own", "qwen3"),), qianfan, towers=OWN)
