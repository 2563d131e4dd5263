# SPDX-License-Identifier: Apache-2.0
"""Qwen3-VL: features of early tower layers join behind the first decoder layers; frames stand apart."""

from __future__ import annotations

from typing import Any

from .base import OWN, Family
from .layouts import Packed
from .qwen2_vl import OUT, processor, qwen

# a table of 12 x 12 places, which is interpolated for other sizes
STACKED: dict[str, Any] = {"num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1, 2]}


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return qwen(OUT | STACKED, layers, overrides, {"head_dim": 16}, {"mrope_interleaved": True})


FAMILY = Family(
    "qwen3_vl", "Qwen3VL", Packed(True), (("own", "own"),), config, processor, towers=OWN, texts=OWN
)
