# SPDX-License-Identifier: Apache-2.0
"""Compaction: from a sequence of L columns to the shorter one of the N columns that are kept.

There are two ways to make one. Where every row loses the same number of tokens, the usual case, one fused
kernel selects the columns and copies all that goes with them (``EvenCompaction``). Otherwise rows that keep
fewer columns than the longest are filled on the left with *dead slots*: they repeat a real, dropped token, so
that nothing is ever NaN, and they are masked.

Where the lengths are known from shapes alone, nothing here asks the device for a value.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    is_even = False  # every row keeps all its columns but the same number of tokens: nothing is filled up
    slides = False  # positions after it are those of the first columns before it

    def __init__(self, keep: Tensor, valid: Tensor, width: int | None = None) -> None:
        self._keep = keep = keep if width is not None else keep & valid
        self.width = int(keep.sum(dim=1).max()) if width is None else width
        self.length = keep.shape[1]
        # a stable sort puts dropped columns first and kept ones last, both ascending: its end is the new
        # sequence
        order = keep.to(torch.int8).argsort(dim=1, stable=True)
        self.index = order[:, self.length - self.width :]  # (B, N)
        self.valid = (keep & valid).gather(1, self.index)  # (B, N)
        self._tokens = valid

    @cached_property
    def kept(self) -> Tensor:
        """(B, L) bool, columns that stay."""
        return self._keep

    @property
    def tail(self) -> int:
        """Columns at the end that every row keeps."""
        return int(self.kept.all(dim=0).flip(0).cumprod(0).sum())

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

    @cached_property
    def lost(self) -> Tensor | int:
        """(B,) tokens dropped from each row, or one number for all rows."""
        return self.lost_before[:, -1]

    def lengths(self, before: list[int]) -> list[int]:
        """Tokens of every row, of which there were so many."""
        return self.count.tolist()

    def sequence(self, rows: Tensor) -> Tensor:
        """(B, L, *) -> (B, N, *)."""
        return unchecked.gather_rows([rows], self.index.to(rows.device))[0]

    def along(self, values: Tensor) -> Tensor:
        """(B or 1, L, *) something of every column -> (B, N, *)."""
        index = self.index.to(values.device).long()
        index = index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        return values.expand(index.shape[0], *values.shape[1:]).gather(1, index)

    def follow(self, mask: Tensor) -> Tensor:
        """(B, L) bool marks of columns -> (B, N)."""
        return mask.gather(1, self.index.long()) & self.valid

    @cached_property
    def new_columns(self) -> Tensor:
        """(B, L) column of the new sequence where each kept column of the old one went."""
        number = self.kept.cumsum(dim=1) - 1
        if self.kept.shape[0] == 1:  # nothing is filled up where there is one row
            return number
        return number + (self.width - self.count)[:, None]

    def moved(self, row: int, columns: Tensor) -> Tensor:
        """(n,) columns of the new sequence where kept columns (n,) of a row went."""
        return self.new_columns[row][columns]

    def positions(self, position_ids: Tensor, policy: Positions) -> Tensor:
        """(..., B or 1, L) -> (..., B, N)."""
        index = self.index.to(position_ids.device).long()
        full = position_ids.expand(*position_ids.shape[:-2], *index.shape[:1], position_ids.shape[-1])
        kept = full.gather(-1, index.expand(*full.shape[:-1], index.shape[-1]))
        if policy == "original":
            return kept
        # less the tokens lost before each; positions of dead slots must not go below 0
        return (kept - self.lost_before.gather(1, self.index).to(kept.device)).clamp_min(0)

    def expand(self, rows: Tensor) -> Tensor:
        """(B, N, D) -> (B, L, D): every old column takes the last kept row at or before it."""
        source = self.new_columns.clamp_min(0).to(rows.device)  # (B, L)
        return unchecked.gather_rows([rows], source)[0]


class EvenCompaction(Compaction):
    """A cut after which every row keeps ``width`` columns: what follows from that, in few launches.

    Args:
        stays: (B, L) float32, 1 for columns that stay and 0 for those that go.
        valid: (B, L) bool, columns that are tokens; all that go are.
        position_ids: (..., B or 1, L); None where they follow each other and are counted anew: then the first
            ones do.
        along: (B or 1, L, *), what ``sequence`` will be asked for once.
        whole: all columns are tokens.

    Attributes:
        index: (B, N) int32.
    """

    is_even = True

    def __init__(
        self,
        stays: Tensor,
        width: int,
        valid: Tensor,
        position_ids: Tensor | None,
        along: Sequence[Tensor],
        *,
        whole: bool,
    ) -> None:
        self.length, self.width, self._tokens, self._whole = stays.shape[1], width, valid, whole
        batch, device = stays.shape[0], stays.device
        self.slides, self.lost = position_ids is None, self.length - self.width
        places: list[Tensor] = []
        if position_ids is not None:
            # (B or 1, L, 1 or 3): the axes of M-RoPE stand behind the columns, since rows are copied
            places = [position_ids[..., None] if position_ids.ndim == 2 else position_ids.movedim(0, -1)]
        xs = [x.to(device).expand(batch, *x.shape[1:]) for x in (*places, *along)]
        self.index, cut = unchecked.prune(stays, width, xs if whole else [*xs, valid])  # (B, N)
        self.valid = valid[:, :width] if whole else cut.pop()
        self._copied = list(zip(along, cut[len(places) :], strict=True))
        if position_ids is not None:
            positions = cut[0][..., 0] if position_ids.ndim == 2 else cut[0].movedim(-1, 0)
            self._copied.append((position_ids, positions))

    @cached_property
    def kept(self) -> Tensor:
        return torch.zeros_like(self._tokens).scatter(1, self.index.long(), True)

    @property
    def tail(self) -> int:
        # columns that moved to the left by all that went: nothing goes behind them
        return int((self.index - self._columns[: self.width] == self.lost).all(dim=0).sum())

    def lengths(self, before: list[int]) -> list[int]:
        return [length - self.length + self.width for length in before]

    @cached_property
    def _columns(self) -> Tensor:
        """(L,) int32, numbers of the columns."""
        return torch.arange(self.length, dtype=torch.int32, device=self.index.device)

    def _take_copy(self, given: Tensor) -> Tensor | None:
        """What was cut of ``given`` in the same launch, once: else the long one would live on with this."""
        for number, (long, short) in enumerate(self._copied):
            if long is given:
                del self._copied[number]
                return short
        return None

    def positions(self, position_ids: Tensor, policy: Positions) -> Tensor:
        if policy == "compact" and self.slides:
            return position_ids[..., : self.width]
        cut = self._take_copy(position_ids)
        kept = super().positions(position_ids, "original") if cut is None else cut.to(position_ids.device)
        if policy == "original":
            return kept
        # a kept column has moved to the left by the tokens that went before it
        numbers = kept - (self.index - self._columns[: self.width]).to(kept.device)
        return numbers if self._whole else numbers.clamp_min(0)  # padding has any position

    def sequence(self, rows: Tensor) -> Tensor:
        cut = self._take_copy(rows)
        return super().sequence(rows) if cut is None else cut

    @cached_property
    def new_columns(self) -> Tensor:
        return self._last_kept().long()

    def moved(self, row: int, columns: Tensor) -> Tensor:
        return torch.searchsorted(self.index[row], columns.int())

    def expand(self, rows: Tensor) -> Tensor:
        return unchecked.gather_rows([rows], self._last_kept().to(rows.device))[0]

    def _last_kept(self) -> Tensor:
        """(B, L) int32, where the last kept column at or before each went; 0 where there is none."""
        columns = self._columns.expand(self.index.shape[0], -1).contiguous()
        behind = self.index[:, 1:].contiguous()  # all kept ones but the first
        return torch.searchsorted(behind, columns, right=True, out_int32=True)
