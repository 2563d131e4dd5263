# SPDX-License-Identifier: Apache-2.0
"""Density-peak clustering, batched: dense tokens far from denser ones become centres, all others join the
nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Peaks(NamedTuple):
    """Clusters of n tokens."""

    prominence: Tensor  # (B, n)
    centres: Tensor  # (B, c) the most prominent tokens, best first, the lower index first in ties
    assignment: Tensor  # (B, n) number of the centre that a token joins


def density_peaks(x: Tensor, clusters: int) -> Peaks:
    """Cluster tokens x (B, n, D); the density of a token is that of its ``clusters`` nearest ones, itself
    included.
    """
    # without matrix products: those lose the digits of small distances, and a token's distance to itself must
    # be 0
    distance = (
        torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[-1] ** 0.5
    )  # (B, n, n)
    density = (-distance.sort(dim=-1).values[..., :clusters].square().mean(dim=-1)).exp()  # (B, n)
    denser = density[:, None, :] > density[:, :, None]
    farthest = distance.amax(dim=(1, 2), keepdim=True)
    prominence = density * torch.where(denser, distance, farthest).amin(dim=-1)
    centres = prominence.sort(dim=-1, descending=True, stable=True).indices[:, :clusters]
    nearest = distance.gather(1, centres[..., None].expand(-1, -1, x.shape[1])).argmin(dim=1)
    number = torch.arange(clusters, device=x.device).expand_as(centres)
    # a centre joins itself even where another one is as near
    return Peaks(prominence, centres, nearest.scatter(1, centres, number))


def cluster_means(x: Tensor, assignment: Tensor, clusters: int) -> Tensor:
    """(B, c, D) mean of the tokens x (B, n, D) of each cluster; none may be empty."""
    joins = (assignment[:, None] == torch.arange(clusters, device=x.device)[:, None]).to(x.dtype)  # (B, c, n)
    return joins @ x / joins.sum(dim=-1, keepdim=True)
