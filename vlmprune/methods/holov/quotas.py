# SPDX-License-Identifier: Apache-2.0
"""Quotas: how k tokens are shared out over crops by weight, in whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6  # of the official code
_TINY = torch.finfo(torch.float32).tiny


def sharpened(scores: Tensor, tau: float) -> Tensor:
    """(B, C) weights in proportion to the scores (B, C) to the power of tau."""
    top = scores.amax(1, keepdim=True).clamp_min(_TINY)
    return (scores / top) ** tau * top  # powers of the scores themselves could overflow


def paper_quota(weight: Tensor, k: int) -> Tensor:
    """(B, C) shares of k by weight (B, C), rounded down; the heaviest crop gets the rest."""
    share = weight / weight.sum(1, keepdim=True).clamp_min(_TINY) * k
    quota = (share * (1 + 1e-6)).floor().long()  # equal shares must not fall below a whole number by rounding
    return quota + hand_out(k - quota.sum(1), weight, torch.full_like(quota, k))


def official_quota(weight: Tensor, k: int) -> Tensor:
    """(B, C) shares of k by weight (B, C), rounded down; the heaviest crops get one more each."""
    quota = (weight / (weight.sum(1, keepdim=True) + EPS) * k).floor().long()
    return quota + hand_out(k - quota.sum(1), weight, torch.ones_like(quota))


def capped(quota: Tensor, weight: Tensor, sizes: Tensor, k: int) -> Tensor:
    """(B, C) quotas that fit: the surplus goes to crops with room, in proportion to weight * room."""
    over = (quota - sizes).clamp_min(0).sum(1, keepdim=True)
    quota = quota.minimum(sizes)
    pull = weight * (sizes - quota)
    # rounded down, so that no more is given than there is; the last line hands out what is left
    share = (over * (pull / pull.sum(1, keepdim=True).clamp_min(_TINY))).floor().long()
    quota = quota + share.minimum(sizes - quota)
    return quota + hand_out(k - quota.sum(1), weight, sizes - quota)


def hand_out(left: Tensor, weight: Tensor, room: Tensor) -> Tensor:
    """(B, C) whole tokens of ``left`` (B,): the heaviest crop takes what it has room for, then the next."""
    order = torch.sort(-weight, dim=-1, stable=True).indices
    room = room.gather(1, order)
    # what the heavier crops can take
    before = room.cumsum(1) - room
    return torch.zeros_like(room).scatter(1, order, (left[:, None] - before).clamp_min(0).minimum(room))
