# SPDX-License-Identifier: Apache-2.0
"""Qwen3.5 and Qwen3-VL-MoE: children of Qwen3-VL with a hybrid decoder, with experts, or with both."""

from __future__ import annotations

from typing import Any

from ..backbones import DELTA, HYBRID, MOE
from .base import OWN, Family
from .layouts import Packed
from .qwen2_vl import OUT, qwen
from .qwen3_vl import STACKED

# factor 1: the sections 2 + 3 + 3 are pairs of all 16 channels of a head
_ROPE: dict[str, Any] = {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
_TOWER: dict[str, Any] = OUT | {"num_position_embeddings": 144}


def stacked_moe(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return qwen(OUT | STACKED, layers, overrides, MOE | {"head_dim": 16}, {"mrope_interleaved": True})


def hybrid(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    kinds = [HYBRID["layer_types"][layer % 4] for layer in range(layers)]
    own = DELTA | {"head_dim": 16, "layer_types": kinds}
    return qwen(_TOWER, layers, overrides, own, _ROPE)


def hybrid_moe(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return hybrid(tower, text, layers, MOE | overrides)


FAMILIES = tuple(
    Family(name, prefix, Packed(True), (("own", "own"),), fields, towers=OWN, texts=OWN, hybrid=states)
    for name, prefix, fields, states in (
        ("qwen3_vl_moe", "Qwen3VLMoe", stacked_moe, False),
        ("qwen3_5", "Qwen3_5", hybrid, True),
        ("qwen3_5_moe", "Qwen3_5Moe", hybrid_moe, True),
    )
)
