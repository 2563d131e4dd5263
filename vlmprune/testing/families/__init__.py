# SPDX-License-Identifier: Apache-2.0
"""Facts about each family of tiny models, one file per family."""

from __future__ import annotations

from ...errors import SpecError
from . import (
    deepseek_ocr2,
    fast_vlm,
    gemma3,
    gemma4,
    glm_vl,
    granite,
    idefics3,
    internvl,
    janus,
    llava,
    llava_next,
    llava_next_video,
    llava_onevision,
    nemotron,
    ovis2,
    packed,
    paligemma,
    pixtral,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_vl,
    shuffled,
    smolvlm,
    unread,
    unread_more,
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
_SHARED = (
    qwen3_5,
    glm_vl,
    pixtral,
    shuffled,
    ovis2,
    janus,
    packed,
    gemma4,
    unread,
    unread_more,
    deepseek_ocr2,
    granite,
    nemotron,
)
FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
FAMILIES |= {family.name: family for module in _SHARED for family in module.FAMILIES}
# second families of files in the first list
FAMILIES |= {family.name: family for family in (gemma3.SHIELD, internvl.QIANFAN)}


def family_of(name: str) -> Family:
    return FAMILIES[known("family", name, tuple(FAMILIES))]


def add_family(family: Family) -> None:
    """Make a tiny model of somebody else's known, so that checks run on it."""
    if family.build is None:
        raise SpecError(f"the tiny model {family.name!r} has no build; expected what makes the model")
    FAMILIES[family.name] = family


def layout_of(name: str) -> Layout:
    return family_of(name).layout
