# SPDX-License-Identifier: Apache-2.0
"""What every kernel means, in plain torch: slow, clear, on any device. All other implementations are tested
against this.

Ranking: the lower index wins ties, NaN ranks lowest, both zeros are the same zero. Indices are int32, those
of a selection ascend. A budget above the number of tokens takes them all. Inputs are validated by
``dispatch``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .crops import crop_scores, crop_variance, share_out, top_k_in_groups

__all__ = [
    "contextual_groups",
    "contextual_rows",
    "crop_scores",
    "crop_variance",
    "detrend",
    "gather_rows",
    "greedy_cover",
    "greedy_dpp",
    "greedy_dpp_features",
    "greedy_maxmin",
    "greedy_maxmin_features",
    "host_slots",
    "ordered_indices",
    "prune",
    "share_out",
    "stretch",
    "top_k_in_groups",
    "topk_select",
    "unprune",
    "zoo_sensitivity",
]
RESIDUAL = 1e-5  # of its start, where the residual of a token is rounding noise: it counts as 0


# --- selection and rows ---------------------------------------------------------------------------


def ranked(scores: Tensor) -> Tensor:
    """(..., N) int64 indices from the highest score to the lowest."""
    # a stable ascending sort of 0 - s: lower index first, NaN last, and no negative zero
    return torch.sort(0.0 - scores.float(), dim=-1, stable=True).indices


def topk_select(scores: Tensor, k: int) -> Tensor:
    """(B, min(k, N)) ascending indices of the highest scores (B, N)."""
    return ranked(scores)[:, :k].sort(dim=-1).values.int()


def prune(scores: Tensor, k: int, xs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """idx (B, min(k, N)) from ``topk_select``, and these rows of each of xs (B, N, *)."""
    idx = topk_select(scores, k)
    return idx, gather_rows(xs, idx)


def gather_rows(xs: Sequence[Tensor], idx: Tensor) -> list[Tensor]:
    """(B, K, *) rows of each of xs (B, N, *) at idx (B, K), in any order."""
    batch = torch.arange(idx.shape[0], device=idx.device)[:, None]
    return [x[batch, idx.long()].contiguous() for x in xs]


def unprune(g: Tensor, idx: Tensor, n: int) -> Tensor:
    """(B, n, *) with the rows of g (B, K, *) at idx (B, K) and zeros elsewhere; rows of one place add up."""
    full = g.new_zeros(g.shape[0], n, *g.shape[2:])
    batch = torch.arange(idx.shape[0], device=idx.device)[:, None].expand_as(idx)
    return full.index_put((batch, idx.long()), g, accumulate=True)


# --- indices --------------------------------------------------------------------------------------


def ordered_indices(idx: Tensor, least: int, n: int) -> tuple[Tensor, Tensor]:
    """idx (B, K) ascending, int64, and (B, K) what is wrong with each: 0, or infinite.

    Wrong is what is not in ``least`` .. n-1, and what repeats the one before; but -1 may repeat.
    """
    ascending = idx.long().sort(dim=-1).values
    before = torch.nn.functional.pad(ascending[:, :-1], (1, 0), value=-1)
    wrong = (ascending < least) | (ascending >= n) | ((ascending == before) & (ascending >= 0))
    return ascending, torch.where(wrong, torch.inf, 0.0)


def host_slots(idx: Tensor, n: int) -> Tensor:
    """(B, K) int64 ascending: the slots in idx (B, K), and for each -1 in it the lowest free one of n."""
    taken = torch.zeros(idx.shape[0], n + 1, device=idx.device)
    # -1 is the last place, which is cut off; of equals the first are taken, so free places come in order
    taken.scatter_(1, idx.long() % (n + 1), 1.0)
    return topk_select(taken[:, :n], idx.shape[1]).long()


# --- greedy choice --------------------------------------------------------------------------------


def best_of(value: Tensor, taken: Tensor) -> Tensor:
    """(B, 1) token of the largest value (B, N) that is not taken; NaN after all numbers, taken ones never."""
    # torch's argmax takes NaN for the largest. Three ranks keep taken tokens, NaN and numbers apart, even
    # where a number is -inf
    low = torch.where(value.isnan(), -torch.inf, value)
    rank = torch.where(taken, 0, torch.where(value.isnan(), 1, 2))
    # numbers, or NaN where no others are left
    top = torch.where(rank == rank.amax(-1, keepdim=True), 1, 0).bool()
    highest = torch.where(top, low, -torch.inf).amax(-1, keepdim=True)
    # argmax of equal values is the first of them: the lower index
    return (top & (low == highest)).int().argmax(-1, keepdim=True)


def nearest(sim: Tensor) -> Tensor:
    """(B, N) similarity of every token to its most similar other one; 0 for a token that is alone."""
    if sim.shape[-1] <= 1:
        return sim.new_zeros(sim.shape[:-1])
    itself = torch.eye(sim.shape[-1], dtype=torch.bool, device=sim.device)
    return sim.masked_fill(itself, -torch.inf).amax(-1)


def greedy_maxmin(
    sim: Tensor, k: int, weight: Tensor | None = None, first: str = "nn"
) -> tuple[Tensor, Tensor]:
    """k times the token of the largest weight * (1 - its largest similarity to the tokens picked before).

    Args:
        sim: (B, N, N); row j holds what the pick j is compared with.
        k: number of picks; at most N are made.
        weight: (B, N), default all ones.
        first: for the first pick, "nn" compares every token with all others, "argmax" takes the largest
            weight.

    Returns:
        order (B, k) int32 in the order of picking, and what each pick was worth (B, k).
    """
    taken = torch.zeros(sim.shape[:2], dtype=torch.bool, device=sim.device)
    value = (
        worth_of(nearest(sim), weight)
        if first == "nn"
        else sim.new_ones(sim.shape[:2])
        if weight is None
        else weight
    )
    order, worth, best = [], [], None
    for _ in range(min(k, sim.shape[-1])):
        pick = best_of(value, taken)
        order.append(pick)
        worth.append(value.gather(1, pick))
        row = sim.gather(1, pick[..., None].expand(-1, -1, sim.shape[-1]))[:, 0]
        # torch.maximum passes NaN on, so a token whose similarity is no number ranks last from here on
        best = row if best is None else torch.maximum(best, row)
        taken = taken.scatter(1, pick, True)
        value = worth_of(best, weight)
    return joined(order, taken).int(), joined(worth, value)


def worth_of(best: Tensor, weight: Tensor | None) -> Tensor:
    return 1 - best if weight is None else weight * (1 - best)


def joined(columns: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([like[:, :0], *columns], dim=1)


def greedy_maxmin_features(
    features: Tensor, k: int, weight: Tensor | None = None, first: str = "nn"
) -> tuple[Tensor, Tensor]:
    """``greedy_maxmin`` by the cosine of features (B, N, D), rows of unit length."""
    return greedy_maxmin(features @ features.transpose(1, 2), k, weight, first)


def greedy_dpp(sim: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Greedy MAP of the determinantal point process L_ij = r_i * sim_ij * r_j, by an incremental Cholesky
    decomposition.

    Args:
        sim: (B, N, N).
        relevance: (B, N), r.
        k: number of picks; at most N are made.

    Returns:
        order (B, k) int32 in the order of picking, and by which factor each pick enlarged the determinant (B,
        k): 0 where the tokens picked before span all others.
    """
    kernel = relevance[..., None] * sim * relevance[:, None]
    residual = kernel.diagonal(dim1=1, dim2=2)
    # a floor for every token, since residuals grow with the square of its relevance
    floor = RESIDUAL * residual.clamp_min(0)
    residual = torch.where(residual <= floor, 0, residual)
    taken = torch.zeros_like(residual, dtype=torch.bool)
    rows = kernel.new_zeros(kernel.shape[0], 0, kernel.shape[-1])  # (B, picks, N) of the decomposition
    order, gain = [], []
    for _ in range(min(k, sim.shape[-1])):
        pick = best_of(residual, taken)
        left = residual.gather(1, pick)  # (B, 1)
        order.append(pick)
        gain.append(left)
        taken = taken.scatter(1, pick, True)
        at = pick[..., None]
        line = kernel.gather(1, at.expand(-1, -1, kernel.shape[-1]))[:, 0]
        # (B, N) inner product of the column of the pick with that of every token
        explained = (rows.gather(2, at.expand(-1, rows.shape[1], -1)) * rows).sum(1)
        # a pick that is explained already has nothing left but noise, whose root would blow it up
        row = torch.where(left > 0, (line - explained) / left.sqrt(), 0)
        rows = torch.cat([rows, row[:, None]], dim=1)
        residual = residual - row.square()
        residual = torch.where(residual <= floor, 0, residual)
    return joined(order, taken).int(), joined(gain, residual)


def greedy_dpp_features(features: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``greedy_dpp`` by the inner products of features (B, N, D)."""
    return greedy_dpp(features @ features.transpose(1, 2), relevance, k)


def greedy_cover(
    rows: Tensor, k: int, weight: Tensor | None = None, combine: str = "product"
) -> tuple[Tensor, Tensor]:
    """k times the token whose column raises the best covers of all rows most: facility location, greedily.

    A row is covered as well as by the best of the tokens picked so far, at least by 0.

    Args:
        rows: (B, R, N), how well token j covers row r.
        k: number of picks; at most N are made.
        weight: (B, N), what the gain of a token is multiplied by, or what is added to it.
        combine: "product", where weights must not be negative, or "sum".

    Returns:
        order (B, k) int32 in the order of picking, and what each pick was worth (B, k).
    """
    taken = torch.zeros(rows.shape[0], rows.shape[2], dtype=torch.bool, device=rows.device)
    best = rows.new_zeros(rows.shape[:2])
    order, worth = [], []
    for _ in range(min(k, rows.shape[2])):
        gain = (rows - best[..., None]).clamp_min(0).sum(1)  # (B, N); NaN stays NaN
        value = gain_worth(gain, weight, combine)
        pick = best_of(value, taken)
        order.append(pick)
        worth.append(value.gather(1, pick))
        taken = taken.scatter(1, pick, True)
        covered = rows.gather(2, pick[:, None].expand(-1, rows.shape[1], -1))[..., 0]  # (B, R)
        best = torch.maximum(best, covered)
    return joined(order, taken).int(), joined(worth, best)


def gain_worth(gain: Tensor, weight: Tensor | None, combine: str) -> Tensor:
    if weight is None:
        return gain
    return gain * weight if combine == "product" else gain + weight


# --- scores ---------------------------------------------------------------------------------------


def zoo_sensitivity(slope: Tensor, kernel: Tensor) -> Tensor:
    """(B, N) g^T K g of slopes g (B, N, H) and a matrix K (H, H)."""
    return ((slope @ kernel) * slope).sum(-1)


def stretch(scores: Tensor, constant: float) -> Tensor:
    """(B, N) scores (B, N) stretched to [0, 1] in every row.

    All ones where the spread of a row is at most ``constant`` of its highest score; NaN where it is not
    finite.
    """
    low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
    spread = high - low
    level = (spread <= constant * high) & (high < torch.inf)
    return ((scores - low) / (spread + 1e-8)).masked_fill(level, 1.0)


def detrend(scores: Tensor, real: Tensor | None = None) -> Tensor:
    """(B, N) float32 scores a_i (B, N) without their exponential trend: a_i exp(-sigma x_i), x_i = i / N.

    sigma is the slope of the least-squares line of log a over x, where a > 0 and, if given, ``real`` (N,) is
    true. A single place has no slope. Scores below zero become NaN.
    """
    a = scores.double()
    x = torch.arange(a.shape[1], dtype=a.dtype, device=a.device)[None] / a.shape[1]
    used = a > 0 if real is None else (a > 0) & real
    count = used.sum(dim=1, keepdim=True).clamp_min(1)
    # 0 at places that are not used: they add nothing to the sums, and xlogy(0, 0) is 0
    dx = (x - (x * used).sum(dim=1, keepdim=True) / count) * used
    # the floor makes the slope of a single place 0 in place of NaN
    sigma = torch.xlogy(dx, a).sum(dim=1, keepdim=True) / dx.square().sum(dim=1, keepdim=True).clamp_min(
        1e-12
    )
    return torch.where(a < 0, torch.nan, a * torch.exp(-sigma * x)).float()


# --- merging --------------------------------------------------------------------------------------


def contextual_groups(keys: Tensor, kept: Tensor, first: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Which row each patch becomes part of, if those that are not kept merge into a few of them.

    rest = the patches that are not kept, R of them; target_j = rest[j max(1, floor(R / c))], j = 0 .. c-1;
    any other one of the rest joins argmax_j cos(key, key of target_j).

    Args:
        keys: (B, N, C).
        kept: (B, d) ascending patches.
        first: rows that stand before those of the kept patches.
        contextual: c, at most R.

    Returns:
        slots (B, first + d + c) int64, the patch of every row, -1 for the first ones, targets last; and row
        (B, N) int64 of every patch, -1 for those that join none, as c is 0.
    """
    batch, n = keys.shape[:2]
    kept = kept.long()
    left = torch.ones(batch, n, dtype=torch.int8, device=keys.device).scatter_(1, kept, 0)
    rest = torch.sort(left, dim=1, descending=True, stable=True).indices[:, : n - kept.shape[1]]
    step = max(1, rest.shape[1] // max(1, contextual))
    spaced = rest[:, : contextual * step].unflatten(1, (contextual, step))  # a target, then members
    targets = spaced[..., 0]
    slots = torch.nn.functional.pad(torch.cat([kept, targets], dim=1), (first, 0), value=-1)
    number = torch.arange(first, slots.shape[1], device=keys.device)
    row = torch.full((batch, n), -1, device=keys.device).scatter_(
        1, slots[:, first:], number.expand(batch, -1)
    )
    if not contextual:
        return slots, row
    members = torch.cat([spaced[..., 1:].flatten(1), rest[:, contextual * step :]], dim=1)
    K = torch.nn.functional.normalize(keys.float(), dim=-1)
    of_members, of_targets = gather_rows([K], members)[0], gather_rows([K], targets)[0]
    join = (of_members @ of_targets.transpose(1, 2)).argmax(-1)  # (B, R-c, c) -> (B, R-c)
    return slots, row.scatter_(1, members, first + kept.shape[1] + join)


def contextual_rows(features: Tensor, slots: Tensor, row: Tensor, start: int, combine: str) -> Tensor:
    """(B, c, D) contextual rows: what the features of a target and those of its members make.

    Args:
        features: (B, N, D).
        slots: (B, start + c) the patch of every row; targets from ``start`` on.
        row: (B, N) of every patch.
        combine: "add", target + mean of its members, or "mean" of target and members.
    """
    targets = slots[:, start:]
    number = torch.arange(start, slots.shape[1], device=slots.device)
    wide = torch.promote_types(features.dtype, torch.float32)  # a sum in half precision would stop growing
    # (B, N, c); one_hot would wait for the GPU. A target is no member of itself
    joins = (row[..., None] == number).scatter_(1, targets[:, None], False).to(wide)
    own = gather_rows([features], targets)[0].to(wide)  # (B, c, D)
    total, count = joins.transpose(1, 2) @ features.to(wide), joins.sum(1)[..., None]
    if combine == "mean":
        return ((own + total) / (1 + count)).to(features.dtype)
    # a target that nothing joins stays as it is
    return (own + total / count.clamp_min(1)).to(features.dtype)
