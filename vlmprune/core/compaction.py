# SPDX-License-Identifier: Apache-2.0
"""Compaction: from a padded parent sequence (B, L) to the shorter child sequence (B, N) of the kept columns.

Rows that keep fewer columns than the longest get *dead slots* on the left: they repeat a real, dropped token, so nothing
is ever NaN, and they are masked. Padding is dropped too, or a text-only row would stop the whole batch from shrinking.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import dispatch


class Compaction:
    """Index maps of one cut.

    Args:
        keep: (B, L) bool, columns to keep.
        valid: (B, L) bool, columns that are tokens and not padding.
    """

    def __init__(self, keep: Tensor, valid: Tensor) -> None:
        keep = keep & valid
        self.count = keep.sum(dim=1)  # (B,)
        tail = keep.all(dim=0).flip(0).cumprod(0).sum()  # columns at the end that every row keeps
        self.width, self.tail = torch.stack([self.count.max(), tail]).tolist()  # the one host sync of a cut
        # a stable sort puts dropped columns first and kept ones last, both ascending: the tail is the child sequence
        self.index = keep.to(torch.int8).argsort(dim=1, stable=True)[:, keep.shape[1] - self.width :]  # (B, N)
        self.valid = keep.gather(1, self.index)  # (B, N)
        self.kept = keep
        self.lost_before = (valid & ~keep).cumsum(dim=1)  # (B, L) tokens dropped up to each column

    @property
    def lost(self) -> Tensor:
        """(B,) tokens dropped from each row."""
        return self.lost_before[:, -1]

    def sequence(self, rows: Tensor) -> Tensor:
        """(B, L, D) -> (B, N, D)."""
        return dispatch.gather_rows([rows], self.index.to(rows.device))[0]

    def positions(self, position_ids: Tensor, policy: str) -> Tensor:
        """(..., B or 1, L) -> (..., B, N): original positions of the kept tokens, or re-counted ones ("compact")."""
        index = self.index.to(position_ids.device)
        full = position_ids.expand(*position_ids.shape[:-2], *index.shape[:1], position_ids.shape[-1])
        kept = full.gather(-1, index.expand(*full.shape[:-1], index.shape[-1]))
        if policy == "compact":
            kept = (kept - self.lost_before.to(kept.device).gather(1, index)).clamp_min(0)  # dead slots must not go below 0
        return kept

    def expand(self, rows: Tensor) -> Tensor:
        """(B, N, D) -> (B, L, D): every parent column takes the last kept row at or before it."""
        source = (self.kept.cumsum(dim=1) - 1 + (self.width - self.count)[:, None]).clamp_min(0).to(rows.device)  # (B, L)
        return dispatch.gather_rows([rows], source)[0]
