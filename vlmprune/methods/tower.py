# SPDX-License-Identifier: Apache-2.0
"""Attention that patches get inside the vision tower: what several methods ask for, and how they read it."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_int, one_of
from ..core.method import Need
from ..core.tokens import VisualTokens


def check_tower_options(cls: str, layer: int | None, anyres: str = "unpad") -> None:
    """Raise unless the options of a method that reads the vision tower are known."""
    one_of("cls", cls, ("token", "mean"))
    one_of("anyres", anyres, ("unpad", "spatial"))
    if layer is not None:
        check_int("layer", layer)


def attention_need(cls: str, layer: int | None) -> Need:
    """Attention of [CLS], or for "mean" what a patch receives from all patches."""
    return Need("cls_attention" if cls == "token" else "received_attention", layer)


def patch_attention(tokens: VisualTokens, cls: str) -> Tensor:
    """(B, H, N) float32 attention; H is 1 for "mean", which is averaged over heads already."""
    if cls == "token":
        return tokens.need("cls_attention").float()
    return tokens.need("received_attention").float()[:, None]  # (B, 1, N)
