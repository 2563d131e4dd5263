# SPDX-License-Identifier: Apache-2.0
"""GLM-4.xV: a convolution puts patches together; frames of a clip stand apart."""

from __future__ import annotations

from typing import Any

from ..backbones import MOE
from .base import OWN, Family
from .layouts import Packed
from .qwen2_vl import OUT, qwen
from .shared import IMAGE_SIZE

_TOWER: dict[str, Any] = OUT | {"image_size": IMAGE_SIZE * 2}


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    made = qwen(_TOWER, layers, overrides, {}, {"partial_rotary_factor": 1.0})
    # GLM has other names for the marks
    starts = made.pop("vision_start_token_id"), made.pop("vision_end_token_id")
    return made | dict(zip(("image_start_token_id", "image_end_token_id"), starts, strict=True))


def moe(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return config(tower, text, layers, MOE | overrides)


def ocr(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return config(tower, text, layers, {"head_dim": 16} | overrides)


FAMILIES = tuple(
    Family(
        name,
        prefix,
        Packed(clips=False),  # they are refused
        (("own", "own"),),
        fields,
        towers=OWN,
        texts=OWN,
        config_prefix=config_prefix,
    )
    for name, prefix, fields, config_prefix in (
        ("glm4v", "Glm4v", config, ""),
        ("glm46v", "Glm46V", config, ""),
        ("glm4v_moe", "Glm4vMoe", moe, ""),
        ("glm_ocr", "GlmOcr", ocr, ""),
        ("glmga", "Glm46V", config, "Glmga"),
    )
)
