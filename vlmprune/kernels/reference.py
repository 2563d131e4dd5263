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
