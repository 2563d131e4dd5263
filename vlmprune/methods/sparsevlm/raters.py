# SPDX-License-Identifier: Apache-2.0
"""Raters: the text tokens that are about the picture, and the attention they give to its patches."""

from __future__ import annotations

from torch import Tensor


def rater_affinity(text: Tensor, visual: Tensor) -> Tensor:
    """(T,) mean over patches (N, D) of their softmax over the text embeddings (T, D); it sums to 1."""
    return (visual.float() @ text.float().T).softmax(dim=1).mean(dim=0)


def rated(attention: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N) attention (B, H, R, N), mean over the raters of the mask (B, R)."""
    if mask is None:
        return attention.mean(dim=2)
    real = mask[:, None, :, None].to(attention.dtype)
    return (attention * real).sum(dim=2) / real.sum(dim=2)
