# SPDX-License-Identifier: Apache-2.0
"""Recycling: the best of the patches that are cut become a few cluster means.

    n1 = int(0.3 P) + 1 candidates of P cut patches,   c = int(n1 / 10) + 1 clusters

A cluster stands after the kept patches and has no place of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.merged import Merged, joins_of, numbers
from ...core.select import best_first, rows_at, top_k
from ...errors import SpecError
from ..clustering import cluster_means, density_peaks


def candidate_count(cut: int) -> int:
    """n1, how many of the patches that are cut may be recycled."""
    return int(0.3 * cut) + 1


def cluster_count(cut: int) -> int:
    """c, how many rows they become."""
    return candidate_count(cut) // 10 + 1


def kept_of(n: int, rows: int) -> int:
    """The most patches of n that are kept where kept patches and clusters are ``rows`` together."""
    fitting = [kept for kept in range(1, rows) if kept + cluster_count(n - kept) == rows]
    if not fitting:
        raise SpecError(
            f"keep={rows} of {n} tokens is too small for the {cluster_count(n)} recycled ones; keep more, or "
            "set recycle=False"
        )
    # the clusters grow with what is cut, so several numbers can fit: the most kept patches
    return fitting[-1]


def pick(features: Tensor, ranking: Tensor, kept: int) -> Merged:
    """The ``kept`` leaders of a ranking (B, N) of features (B, N, D), in their order."""
    keep, n = top_k(ranking, kept), features.shape[1]
    return Merged(rows_at(features, keep), keep, joins=lambda: joins_of([(keep, numbers(keep))], n))


def recycle(features: Tensor, scores: Tensor, kept: int, ranking: Tensor | None = None) -> Merged:
    """What ``pick`` picks, by default by the scores, then clusters of the best scores among the others."""
    picked = pick(features, scores if ranking is None else ranking, kept)
    cut = features.shape[1] - kept
    c = cluster_count(cut)
    # what is kept is no candidate
    of_cut = scores.scatter(1, picked.slots, -torch.inf)
    best = best_first(of_cut, candidate_count(cut))
    x = rows_at(features, best).float()  # (B, n1, D)
    joined = density_peaks(x, c).assignment  # (B, n1)
    merged = cluster_means(x, joined, c).to(features.dtype)
    # -1: a cluster has no place of its own
    no_place = picked.slots.new_full((len(x), c), -1)
    rows, slots = torch.cat([picked.features, merged], dim=1), torch.cat([picked.slots, no_place], dim=1)
    keep, n = picked.slots, features.shape[1]
    return Merged(rows, slots, joins=lambda: joins_of([(keep, numbers(keep)), (best, kept + joined)], n))
