# SPDX-License-Identifier: Apache-2.0
"""Compaction: from a sequence of L columns to the shorter one of the N columns that are kept.

Rows of a batch that keep fewer columns than the longest are filled on the left with *dead slots*: they repeat
a real, dropped token, so that nothing is ever NaN, and they are masked.

Where the lengths are known from shapes alone, nothing here asks the device for a value.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ...kernels import unchecked

Positions = Literal["compact", "original"]  # position ids of the kept sequence: re-counted, or with gaps


class Compaction:
    """Index maps of one cut.

    Args:
        keep: (B, L) bool, columns to keep.
        valid: (B, L) bool, columns that are tokens and not padding.
        width: N, where the caller knows it; padding columns then count as kept. Without it padding is
            dropped, or a row without a picture would stop the whole batch from shrinking, and the device is
            asked once.
        tail: columns at the end that every row keeps, where the caller knows a lower bound.
    """

    def __init__(
        self, keep: Tensor, valid: Tensor, width: int | None = None, tail: int | None = None
    ) -> None:
        self.kept = keep = keep if width is not None else keep & valid
        if tail is None and width is not None and keep.device.type != "cpu":
            tail = 0  # a bound for what may be cropped of a cache, which is not worth asking the device for
        if width is None or tail is None:
            every = keep.all(dim=0).flip(0).cumprod(0).sum()  # columns at the end that every row keeps
            width, tail = torch.stack([keep.sum(dim=1).max(), every]).tolist()
        self.width, self.tail = width, tail
        # a stable sort puts dropped columns first and kept ones last, both ascending: its end is the new
        # sequence
        order = keep.to(torch.int8).argsort(dim=1, stable=True)
        self.index = order[:, keep.shape[1] - width :]  # (B, N)
        self.valid = (keep & valid).gather(1, self.index)  # (B, N)
        self._tokens = valid

    @cached_property
    def dropped(self) -> Tensor:
        """(B, L) bool, tokens that go."""
        return self._tokens & ~self.kept

    @cached_property
    def count(self) -> Tensor:
        """(B,) columns that every row keeps."""
        return self.kept.sum(dim=1)

    @cached_property
    def lost_before(self) -> Tensor:
        """(B, L) tokens dropped up to each column."""
        return self.dropped.cumsum(dim=1)

    @property
    def lost(self) -> Tensor:
        """(B,) tokens dropped from each row."""
        return self.lost_before[:, -1]

    def sequence(self, rows: Tensor) -> Tensor:
        """(B, L, D) -> (B, N, D)."""
        return unchecked.gather_rows([rows], self.index.to(rows.device))[0]

    def follow(self, mask: Tensor) -> Tensor:
        """(B, L) bool marks of columns -> (B, N)."""
        return mask.gather(1, self.index) & self.valid

    def new_columns(self) -> Tensor:
        """(B, L) column of the new sequence where each kept column of the old one went."""
        number = self.kept.cumsum(dim=1) - 1
        if self.kept.shape[0] == 1:  # nothing is filled up where there is one row
            return number
        return number + (self.width - self.count)[:, None]

    def positions(self, position_ids: Tensor, policy: Positions) -> Tensor:
        """(..., B or 1, L) -> (..., B, N)."""
        index = self.index.to(position_ids.device)
        full = position_ids.expand(*position_ids.shape[:-2], *index.shape[:1], position_ids.shape[-1])
        kept = full.gather(-1, index.expand(*full.shape[:-1], index.shape[-1]))
        if policy == "compact":  # dead slots must not go below 0
            kept = (kept - self.lost_before.to(kept.device).gather(1, index)).clamp_min(0)
        return kept

    def expand(self, rows: Tensor) -> Tensor:
        """(B, N, D) -> (B, L, D): every old column takes the last kept row at or before it."""
        source = self.new_columns().clamp_min(0).to(rows.device)  # (B, L)
        return unchecked.gather_rows([rows], source)[0]
