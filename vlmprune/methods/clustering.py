# SPDX-License-Identifier: Apache-2.0
"""Density-peak clustering: dense tokens far from denser ones become centres, the others join the nearest.

    D_ij      = |x_i - x_j| / sqrt(d)
    density_i = exp(-mean of the m smallest D_ij^2), i itself included
    apart_i   = min D_ij over the denser j, or the largest D of all
    centres   = the c largest density * apart

over n tokens x of width d, for c clusters and m neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.select import best_first

_NEAR = 1e-3  # of squared lengths: below it the difference itself is measured
_PAIRS_AT_ONCE = 4096


class Peaks(NamedTuple):
    """Clusters of n tokens."""

    prominence: Tensor  # (B, n) density * apart
    centres: Tensor  # (B, c) the most prominent tokens, best first, the lower index first in ties
    assignment: Tensor  # (B, n) number of the centre that a token joins


def density_peaks(x: Tensor, clusters: int) -> Peaks:
    """Cluster tokens x (B, n, d) around so many centres, by as many neighbours."""
    # matrix products would lose the digits of small distances; a token's distance to itself must be 0
    D = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5  # (B, n, n)
    return peaks_of(D, clusters, clusters)


def peaks_of(D: Tensor, clusters: int, neighbours: int, *, first_is_denser: bool = False) -> Peaks:
    """Clusters by distances D (B, n, n).

    Args:
        clusters: centres, n at most.
        neighbours: tokens whose distances make the density; fewer where there are fewer.
        first_is_denser: of equally dense tokens the first counts as denser, so that copies are not all peaks.
    """
    # the smallest distance of a token is the 0 to itself, so it is always counted
    density = (-D.sort(dim=-1).values[..., :neighbours].square().mean(dim=-1)).exp()  # (B, n)
    denser = density[:, None, :] > density[:, :, None]  # (B, i, j): j is denser than i
    if first_is_denser:
        earlier = torch.ones_like(D[0], dtype=torch.bool).tril(-1)  # j < i
        denser |= (density[:, None, :] == density[:, :, None]) & earlier
    # nothing is denser than the densest token: it is as far apart as any two are
    apart = torch.where(denser, D, D.amax(dim=(1, 2), keepdim=True)).amin(dim=-1)
    prominence = density * apart
    centres = best_first(prominence, clusters)
    # (B, n) number of the nearest centre
    nearest = D.gather(1, centres[..., None].expand(-1, -1, D.shape[1])).argmin(dim=1)
    number = torch.arange(clusters, device=D.device).expand_as(centres)
    # a centre joins itself even where another one is as near
    return Peaks(prominence, centres, nearest.scatter(1, centres, number))


def frame_peaks(x: Tensor, clusters: int, neighbours: int) -> Peaks:
    """Cluster the tokens x (n, d) of a frame; the batch of the answer is 1."""
    return peaks_of(distances(x)[None], clusters, neighbours, first_is_denser=True)


def distances(x: Tensor) -> Tensor:
    """(n, n) distances of tokens x (n, d) over sqrt(d), in float32: products for most pairs, which are many
    times faster, and differences for near ones, of which products lose the digits.
    """
    # without what all have in common, little is near
    x = x.detach().float()
    x = x - x.mean(dim=0)
    products = x @ x.T
    size = products.diagonal()
    both = size[:, None] + size
    square = (both - 2 * products).clamp_min(0)
    # each pair once; it is written to both of its places below
    near = (square <= _NEAR * both).triu(1).nonzero()  # (P, 2)
    for pairs in near.split(_PAIRS_AT_ONCE):
        one, other = pairs.unbind(dim=1)
        exact = (x[one] - x[other]).square().sum(dim=-1)
        square[one, other] = exact
        square[other, one] = exact
    # products may say that a token is not where it is
    return (square.fill_diagonal_(0) / x.shape[1]).sqrt()


def cluster_means(x: Tensor, assignment: Tensor, clusters: int) -> Tensor:
    """(B, c, d) mean of the tokens x (B, n, d) of each cluster; none may be empty."""
    joins = (assignment[:, None] == torch.arange(clusters, device=x.device)[:, None]).to(x.dtype)  # (B, c, n)
    return joins @ x / joins.sum(dim=-1, keepdim=True)


def cluster_sums(x: Tensor, assignment: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """(c, d) sum and (c, 1) number of the tokens x (n, d) of each cluster, which may be empty."""
    if x.device.type == "cpu":
        # on the CPU additions are in a fixed order, and no (c, n) matrix is needed
        count = torch.bincount(assignment, minlength=clusters).to(x.dtype)[:, None]
        return x.new_zeros(clusters, x.shape[1]).index_add(0, assignment, x), count
    # adding up by index is not deterministic on CUDA
    joins = (assignment == torch.arange(clusters, device=x.device)[:, None]).to(x.dtype)  # (c, n)
    return joins @ x, joins.sum(dim=1, keepdim=True)
