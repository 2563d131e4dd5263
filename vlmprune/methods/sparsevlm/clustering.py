# SPDX-License-Identifier: Apache-2.0
"""Density-peak clustering: dense tokens far from denser ones become centres, the others join the nearest.

    D_ij      = |x_i - x_j| / sqrt(d)
    density_i = exp(-mean of the c smallest D_ij^2), i itself included
    apart_i   = min D_ij over the denser j, or the largest D of all
    centres   = the c largest density * apart

over n tokens x of width d, for c clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.select import best_first


class Peaks(NamedTuple):
    """Clusters of n tokens."""

    prominence: Tensor  # (B, n) density * apart
    centres: Tensor  # (B, c) the most prominent tokens, best first, the lower index first in ties
    assignment: Tensor  # (B, n) number of the centre that a token joins


def density_peaks(x: Tensor, clusters: int) -> Peaks:
    """Cluster tokens x (B, n, d) around so many centres."""
    # matrix products would lose the digits of small distances; a token's distance to itself must be 0
    D = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5  # (B, n, n)
    density = (-D.sort(dim=-1).values[..., :clusters].square().mean(dim=-1)).exp()  # (B, n)
    denser = density[:, None, :] > density[:, :, None]
    apart = torch.where(denser, D, D.amax(dim=(1, 2), keepdim=True)).amin(dim=-1)
    prominence = density * apart
    centres = best_first(prominence, clusters)
    nearest = D.gather(1, centres[..., None].expand(-1, -1, x.shape[1])).argmin(dim=1)
    number = torch.arange(clusters, device=x.device).expand_as(centres)
    # a centre joins itself even where another one is as near
    return Peaks(prominence, centres, nearest.scatter(1, centres, number))


def cluster_means(x: Tensor, assignment: Tensor, clusters: int) -> Tensor:
    """(B, c, d) mean of the tokens x (B, n, d) of each cluster; none may be empty."""
    joins = (assignment[:, None] == torch.arange(clusters, device=x.device)[:, None]).to(x.dtype)  # (B, c, n)
    return joins @ x / joins.sum(dim=-1, keepdim=True)
