# SPDX-License-Identifier: Apache-2.0
"""Facts about each family of tiny models, one file per family."""

from __future__ import annotations

from . import (
    fast_vlm,
    gemma3,
    glm_vl,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    ovis2,
    paligemma,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    shuffled,
    smolvlm,
    video_llava,
    vipllava,
)
from .base import Family
from .layouts import Layout
from .shared import known

_MODULES = (
    llava,
    llava_next,
    llava_onevision,
    vipllava,
    llava_next_video,
    video_llava,
    internvl,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    idefics3,
    smolvlm,
    fast_vlm,
    paligemma,
    gemma3,
)
# files with several families that share their structure
_SHARED = (qwen3_5, glm_vl, pixtral, shuffled, ovis2)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
FAMILIES |= {family.name: family for module in _SHARED for family in module.FAMILIES}


def family_of(name: str) -> Family:
    return FAMILIES[known("family", name, tuple(FAMILIES))]


def layout_of(name: str) -> Layout:
    return family_of(name).layout
