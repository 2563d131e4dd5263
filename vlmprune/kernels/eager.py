# SPDX-License-Identifier: Apache-2.0
"""The kernels in plain torch, on any device and without waits of the host: where there is no Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .reference import (
    contextual_groups,
    contextual_rows,
    crop_scores,
    crop_variance,
    detrend,
    greedy_cover,
    greedy_dpp,
    greedy_maxmin,
    host_slots,
    ordered_indices,
    share_out,
    stretch,
    top_k_in_groups,
    topk_select,
)

_CHUNK = 512  # rows of similarities held at a time


# --- rows -----------------------------------------------------------------------------------------


def prune(scores: Tensor, k: int, xs: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    idx = topk_select(scores, k)
    return idx, gather_rows(xs, idx)


def gather_rows(xs: Sequence[Tensor], idx: Tensor) -> list[Tensor]:
    # index_select copies whole rows; gather and advanced indexing take 6 to 30 times as long on the CPU
    if idx.shape[0] == 1:  # needs no copy of a part of a longer sequence
        return [x[0].index_select(0, idx[0])[None] for x in xs]
    return [_flat(x).index_select(0, _numbered(idx, x.shape[1])).unflatten(0, idx.shape) for x in xs]


def unprune(g: Tensor, idx: Tensor, n: int, ordered: bool = False) -> Tensor:
    full = g.new_zeros(g.shape[0] * n, *g.shape[2:])
    # adding by index is slower, and not deterministic on CUDA; rows that are distinct need no sum
    place = full.index_copy_ if ordered else full.index_add_
    return place(0, _numbered(idx, n), _flat(g)).unflatten(0, (g.shape[0], n))


def _numbered(idx: Tensor, n: int) -> Tensor:
    """(B * K) int64 rows of a flattened (B, n, *) for idx (B, K)."""
    return (idx + torch.arange(idx.shape[0], device=idx.device)[:, None] * n).flatten()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


# --- greedy choice, in memory that grows with N only ----------------------------------------------


def greedy_maxmin_features(
    features: Tensor, k: int, weight: Tensor | None = None, first: str = "nn"
) -> tuple[Tensor, Tensor]:
    taken = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    if first == "nn":
        value = reference.worth_of(_nearest(features), weight)
    else:
        value = features.new_ones(taken.shape) if weight is None else weight
    order, worth, best = [], [], None
    for _ in range(min(k, features.shape[1])):
        pick = reference.best_of(value, taken)
        order.append(pick)
        worth.append(value.gather(1, pick))
        row = _similar(features, _at(features, pick))
        best = row if best is None else torch.maximum(best, row)
        taken = taken.scatter(1, pick, True)
        value = reference.worth_of(best, weight)
    return reference.joined(order, taken).int(), reference.joined(worth, value)


def greedy_dpp_features(features: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Gram-Schmidt: a token's part along the new direction q of a pick is its entry of the Cholesky row."""
    k = min(k, features.shape[1])
    residual = relevance * features.square().sum(-1) * relevance
    floor = reference.RESIDUAL * residual.clamp_min(0)
    residual = torch.where(residual <= floor, 0, residual)
    taken = torch.zeros_like(residual, dtype=torch.bool)
    # (B, directions, D), no more directions than dimensions
    basis = features.new_zeros(features.shape[0], min(k, features.shape[2]), features.shape[2])
    order, gain = [], []
    for step in range(k):
        pick = reference.best_of(residual, taken)
        left = residual.gather(1, pick)
        order.append(pick)
        gain.append(left)
        taken = taken.scatter(1, pick, True)
        if step == basis.shape[1]:
            residual = torch.where(residual.isnan(), residual, 0)  # D directions span everything
        if step >= basis.shape[1]:
            continue
        q = _at(features, pick)  # (B, D)
        for _ in range(2):  # once leaves rounding errors that grow with every pick
            q = q - _similar(basis.transpose(1, 2), _similar(basis, q))
        q = torch.where(left > 0, torch.nn.functional.normalize(q, dim=-1), 0)
        basis[:, step] = q
        residual = residual - (relevance * _similar(features, q)).square()
        residual = torch.where(residual <= floor, 0, residual)
    return reference.joined(order, taken).int(), reference.joined(gain, residual)


def _at(features: Tensor, pick: Tensor) -> Tensor:
    """(B, D) rows of features (B, N, D) at pick (B, 1)."""
    return features.gather(1, pick[..., None].expand(-1, -1, features.shape[-1]))[:, 0]


def _similar(features: Tensor, row: Tensor) -> Tensor:
    """(B, N) inner products of features (B, N, D) with row (B, D)."""
    return (features @ row[..., None])[..., 0]


def _nearest(features: Tensor) -> Tensor:
    """(B, N) similarity of every token to its most similar other one."""
    n = features.shape[1]
    if n <= 1:
        return features.new_zeros(features.shape[:2])
    found = []
    for start in range(0, n, _CHUNK):
        sim = features[:, start : start + _CHUNK] @ features.transpose(1, 2)  # (B, chunk, N)
        # a chunk begins at row ``start``, so that its tokens meet themselves on a shifted diagonal
        sim.diagonal(start, dim1=1, dim2=2).fill_(-torch.inf)
        found.append(sim.amax(-1))
    return torch.cat(found, dim=1)


# --- scores ---------------------------------------------------------------------------------------


def zoo_sensitivity(slope: Tensor, kernel: Tensor) -> Tensor:
    return torch.linalg.vecdot(slope @ kernel, slope)
