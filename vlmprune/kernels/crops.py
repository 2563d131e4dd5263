# SPDX-License-Identifier: Apache-2.0
"""What the kernels of crops mean, in plain torch: a part of ``reference``.

A crop is a group of tokens that shares a budget with others: ``members`` (C, M) has the tokens of each, and
-1 behind the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6  # added where the official code of HoloV divides
TINY = torch.finfo(torch.float32).tiny
ROUNDED = 1 + 1e-6  # equal shares must not fall below a whole number by rounding
_CHUNK = 512  # rows of a similarity matrix held at a time


def sizes_of(members: Tensor) -> Tensor:
    """(C,) tokens of every crop."""
    return (members >= 0).sum(1)


def in_crops(values: Tensor, members: Tensor) -> Tensor:
    """(B, C, M) values (B, N) by crop, or (B, C, M, D) of (B, N, D); zero after the last token of a crop."""
    end = (0, 1) if values.ndim == 2 else (0, 0, 0, 1)
    return torch.nn.functional.pad(values, end)[:, members]  # -1 finds the zero at the end


# --- scores ---------------------------------------------------------------------------------------


def crop_variance(features: Tensor, members: Tensor) -> Tensor:
    """(B, C, M) float32 variance V_i = sum_j (S_ij - mu_i)^2 / (M - 1) of the cosines of features (B, N, D).

    S_ij is the cosine of tokens i and j of a crop of M tokens, S_ii = 0, and mu_i = sum_j S_ij / (M - 1).
    """
    x = in_crops(features.float(), members)  # (B, C, M, D)
    z = x / (x.norm(dim=-1, keepdim=True) + EPS)
    real = (members >= 0)[:, None]  # (C, 1, M)
    others = (real.sum(-1, keepdim=True) - 1).clamp_min(1)  # M - 1
    found = []
    for start in range(0, members.shape[1], _CHUNK):
        S = z[:, :, start : start + _CHUNK] @ z.transpose(2, 3)  # (B, C, chunk, M)
        # a chunk begins at row ``start``, so its tokens meet themselves on a shifted diagonal
        S.diagonal(start, dim1=2, dim2=3).zero_()
        mu = S.sum(-1, keepdim=True) / others
        # the zero of the diagonal counts
        found.append(((S - mu).square() * real).sum(-1) / others[..., 0])
    return torch.cat(found, dim=2) * real[:, 0]


def crop_scores(
    attention: Tensor, variance: Tensor | None, members: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """H_i = A_i + alpha g V_i with g = mean(A) / mean(V), means over the crop of i.

    Args:
        attention: (B, N), A.
        variance: (B, C, M), V; None: H is A.
        members: (C, M).
        alpha: weight of the variance.

    Returns:
        H (B, C, M), NaN where A is negative, which attention cannot be, and mean(A) (B, C).
    """
    A, M = in_crops(attention, members), sizes_of(members)  # (B, C, M), (C,)
    mean_A, H = A.sum(-1) / M, A
    if variance is not None:
        g = mean_A / (variance.sum(-1) / M + EPS)  # (B, C)
        H = A + alpha * variance * g[..., None]
    return torch.where(A < 0, torch.nan, H), mean_A


# --- quotas ---------------------------------------------------------------------------------------


def share_out(mass: Tensor, members: Tensor, k: int, tau: float, rule: str) -> Tensor:
    """(B, C) int64 tokens that each crop keeps: k in all, as long as the crops have so many.

    Args:
        mass: (B, C), what the weight of a crop is made of: mass^tau. What is no number counts as 0.
        members: (C, M) tokens of every crop.
        k: tokens to share out.
        tau: sharpness.
        rule: "paper": what rounding leaves over goes to the heaviest crop; "official": one to each of the
            heaviest.
    """
    weight = sharpened(mass.nan_to_num(nan=0.0), tau)
    quota = paper_quota(weight, k) if rule == "paper" else official_quota(weight, k)
    return capped(quota, weight, sizes_of(members), k)


def sharpened(mass: Tensor, tau: float) -> Tensor:
    """(B, C) weights in proportion to mass (B, C) to the power of tau."""
    top = mass.amax(1, keepdim=True).clamp_min(TINY)
    return (mass / top) ** tau * top  # powers of the masses themselves could overflow


def paper_quota(weight: Tensor, k: int) -> Tensor:
    """(B, C) shares of k by weight (B, C), rounded down; the heaviest crop gets the rest."""
    share = weight / weight.sum(1, keepdim=True).clamp_min(TINY) * k
    quota = (share * ROUNDED).floor().long()
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
    share = (over * (pull / pull.sum(1, keepdim=True).clamp_min(TINY))).floor().long()
    quota = quota + share.minimum(sizes - quota)
    return quota + hand_out(k - quota.sum(1), weight, sizes - quota)


def hand_out(left: Tensor, weight: Tensor, room: Tensor) -> Tensor:
    """(B, C) whole tokens of ``left`` (B,): the heaviest crop takes what it has room for, then the next."""
    order = torch.sort(-weight, dim=-1, stable=True).indices
    room = room.gather(1, order)
    # what the heavier crops can take
    before = room.cumsum(1) - room
    return torch.zeros_like(room).scatter(1, order, (left[:, None] - before).clamp_min(0).minimum(room))


# --- choice ---------------------------------------------------------------------------------------


def top_k_in_groups(scores: Tensor, members: Tensor, quota: Tensor, k: int) -> Tensor:
    """(B, k) int64 tokens: of every group its ``quota`` highest scores, group after group, best first.

    Args:
        scores: (B, G, M); the earlier member wins ties, NaN is lowest.
        members: (G, M) token of every score, -1 behind the last member of a group.
        quota: (B, G). A group that is taken whole keeps its own order.
        k: length of the rows. What the groups give beyond k is cut off; -1 fills up what they give less.
    """
    batch, real = scores.shape[0], members >= 0
    # (B, G, M)
    taken = torch.arange(members.shape[1], device=members.device) < quota.clamp_max(real.sum(1))[..., None]
    scores = torch.where((quota >= real.sum(1))[..., None], 0.0, scores).masked_fill(~real, -torch.inf)
    order = torch.sort(0.0 - scores, dim=-1, stable=True).indices
    tokens = members.expand(batch, -1, -1).gather(2, order).masked_fill(~taken, -1).flatten(1)
    front = torch.sort((~taken).flatten(1).to(torch.int8), dim=-1, stable=True).indices[:, :k]
    return tokens.gather(1, front)
