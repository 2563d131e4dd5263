# SPDX-License-Identifier: Apache-2.0
"""What RCP is trained by, beside the answers: rows like those of the dense model, and a share of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def repair_loss(student: Tensor, teacher: Tensor, variance_weight: float = 1.0) -> Tensor:
    """() difference of means and biased variances of every channel; both (layers, R, D), rows of answers."""
    mean = (student.mean(dim=1) - teacher.mean(dim=1)).square().mean(dim=1)
    variance = (student.var(dim=1, correction=0) - teacher.var(dim=1, correction=0)).square().mean(dim=1)
    return (mean + variance_weight * variance).mean()


def mean_share(shares: Tensor, layers: Sequence[int], depth: int) -> Tensor:
    """(B,) share of visual tokens over all layers, for shares (B, n) that go on behind each cut."""
    # layers before the first cut read all tokens, those behind a cut what it lets through
    lengths = lengths_of(layers, depth)
    rest = torch.tensor(lengths[1:], dtype=shares.dtype, device=shares.device)
    return (lengths[0] + shares @ rest) / depth


def sparsity_loss(shares: Tensor, layers: Sequence[int], depth: int, target: float) -> Tensor:
    """() distance of the mean share from a target."""
    return (mean_share(shares, layers, depth).mean() - target).abs()


def lengths_of(layers: Sequence[int], depth: int) -> list[int]:
    """Layers before the first cut, between two cuts, and behind the last."""
    ends = [0, *layers, depth]
    return [after - before for before, after in pairwise(ends)]
