# SPDX-License-Identifier: Apache-2.0
"""Crops of a picture: which tokens form one. Rows of crops are as long as the largest, filled up with -1."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.grid import Grids, cells


def windows(grids: Grids, count: int) -> Tensor:
    """(C, M) tokens of about ``count`` near-square windows; a grid too small for a window is one itself."""
    ids = cells(grids, count)
    # grids without a cell are -1 in ``ids`` and get numbers of their own; unique closes the gaps
    grid = torch.arange(len(grids)).repeat_interleave(torch.tensor([rows * cols for rows, cols in grids]))
    return _members(torch.where(ids < 0, count + grid, ids).unique(return_inverse=True)[1])


def bands(n: int, count: int) -> Tensor:
    """(C, M) tokens of ``count`` runs in raster order; the first n % count hold one more."""
    return _members(torch.arange(count).repeat_interleave(n // count + (torch.arange(count) < n % count)))


def _members(crop: Tensor) -> Tensor:
    """(C, M) tokens by crop, from the crop (N,) of every token."""
    sizes = torch.bincount(crop)
    real = torch.arange(int(sizes.max())) < sizes[:, None]
    # stable: crop after crop, and each of them in raster order
    return torch.full(real.shape, -1).masked_scatter(real, crop.argsort(stable=True))
