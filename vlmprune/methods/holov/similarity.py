# SPDX-License-Identifier: Apache-2.0
"""How much the similarities of a token with the others of its crop vary."""

from __future__ import annotations

import torch
from torch import Tensor

from .crops import in_crops
from .quotas import EPS

_CHUNK = 512  # rows of a similarity matrix held at a time


def variance(features: Tensor, members: Tensor) -> Tensor:
    """(B, C, M) variance V of the cosines S_ij over the other tokens j of a crop; features are (B, N, D)."""
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
