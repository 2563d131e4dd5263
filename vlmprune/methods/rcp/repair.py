# SPDX-License-Identifier: Apache-2.0
"""RCP's delayed repair: layers later, the rows that give the answer are told what was dropped.

Letters: B prompts, N visual tokens of a picture, D width of the model, r width of the repair, e width of a
place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .pruner import Weights

CONTEXT_SHAPES: dict[str, tuple[str, ...]] = {
    "position": ("N", "e"),
    "mask_query": ("e",),
    "mask_out.weight": ("r", "e"),
    "mask_out.bias": ("r",),
    "dropped.weight": ("r", "D"),
    "dropped.bias": ("r",),
}
REPAIR_SHAPES: dict[str, tuple[str, ...]] = {
    "down.weight": ("r", "D"),
    "down.bias": ("r",),
    "condition.weight": ("r", "D"),
    "condition.bias": ("r",),
    "gamma.weight": ("r", "r"),
    "gamma.bias": ("r",),
    "beta.weight": ("r", "r"),
    "beta.bias": ("r",),
    "up.weight": ("D", "r"),
    "up.bias": ("D",),
    "alpha": ("1",),
}


def mask_embedding(w: Weights, c: Tensor) -> Tensor:
    """(B, r) where tokens are left: c (B, N), 1 for those that are.

    Dead places count with a score of 0, not of minus infinity: how many there are is seen too.
    """
    E = positions_for(w["position"], c.shape[1]) * c[..., None]  # (B, N, e)
    share = (E @ w["mask_query"] / E.shape[2] ** 0.5).softmax(dim=1)
    return F.linear((share[..., None] * E).sum(dim=1), w["mask_out.weight"], w["mask_out.bias"])


def dropped_embedding(w: Weights, states: Tensor, dropped: Tensor) -> Tensor:
    """(B, r) what was dropped: the mean of those ``states`` (B, N, D), of a zero vector where none was."""
    total = torch.where(dropped[..., None], states, 0.0).sum(dim=1)
    mean = total / dropped.sum(dim=1, keepdim=True).clamp_min(1)
    return F.linear(mean, w["dropped.weight"], w["dropped.bias"])


def repaired(w: Weights, x: Tensor, context: Tensor) -> Tensor:
    """(B, R, D) rows x with what a small adapter adds under a context (B, r).

    h' = (1 + G cond) * h + F cond with cond = context + C x and h = gelu(W x); x + alpha U h'
    """
    cond = context[:, None] + _linear(w, "condition", x)  # (B, R, r)
    h = F.gelu(_linear(w, "down", x))
    # gamma is G and beta is F
    h = (1 + _linear(w, "gamma", cond)) * h + _linear(w, "beta", cond)
    return x + w["alpha"] * _linear(w, "up", h)


def positions_for(E: Tensor, count: int) -> Tensor:
    """(count, e) the table of places E (N, e), drawn out or together along the sequence."""
    if E.shape[0] == count:
        return E
    # (1, e, N): interpolate works along the last axis
    return F.interpolate(E.T[None], size=count, mode="linear", align_corners=False)[0].T


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])
