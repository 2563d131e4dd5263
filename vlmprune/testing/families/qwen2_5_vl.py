# SPDX-License-Identifier: Apache-2.0
"""Qwen2.5-VL: half of the blocks of the tower attend inside windows of 2 x 2 tokens."""

from __future__ import annotations

from typing import Any

from .base import OWN, Family
from .layouts import Packed
from .qwen2_vl import OUT, processor, qwen
from .shared import PATCH_SIZE

# window_size is in pixels: 2 x 2 tokens of 2 x 2 patches
WINDOWS: dict[str, Any] = {"window_size": 4 * PATCH_SIZE, "fullatt_block_indexes": [1, 3]}


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return qwen(OUT | WINDOWS, layers, overrides)


FAMILY = Family(
    "qwen2_5_vl", "Qwen2_5_VL", Packed(), (("own", "own"),), config, processor, towers=OWN, texts=OWN
)
