# SPDX-License-Identifier: Apache-2.0
"""VipLLaVA: LLaVA that reads several layers of the tower at once."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from . import llava
from .base import Family, text_config, vision_config
from .layouts import Layout
from .shared import IMAGE_ID

NEEDS_CLS = "it drops a [CLS] token, which only clip has; use tower='clip'"


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    plural = "vision_feature_layers"  # what older transformers call it
    names = inspect.signature(transformers.VipLlavaConfig).parameters
    return {
        "vision_config": vision_config(tower),
        "text_config": text_config(text, layers, overrides),
        "image_token_index": IMAGE_ID,
        plural if plural in names else plural[:-1]: [-2, -3, 1],
    }


FAMILY = Family(
    "vipllava",
    "VipLlava",
    Layout(),
    (("clip", "llama"),),
    config,
    llava.processor,
    processor_prefix="Llava",
    refused={"siglip": NEEDS_CLS},
)
