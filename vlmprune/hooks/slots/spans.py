# SPDX-License-Identifier: Apache-2.0
"""What cuts inside the language model know of one forward: tokens that are left, and rows that rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.merged import Merged, names_of, through
from ..vision.pictures import Grids, Picture

if TYPE_CHECKING:
    from ...core.report import Report
    from .cutting import Cut
    from .ranking import Ranked


@dataclass(eq=False)
class Span:
    """The tokens of one picture that are still there, in one row of the batch.

    Args:
        row: of the batch.
        columns: (n,) ascending columns of the sequence that they stand at.
        ids: (n,) patch number in the picture, -1 for merged rows; None: all patches.
        number: of the picture in the report.
        shown: whether this is the first row that shows the picture.
        ordinal: of the picture in its row.
        picture: it.
        tokens: (n,) the same as ``ids`` where rows that were merged before stand in other places than those
            of their tokens; None: ``ids`` says it.
        parts: gives (N,) or (N, J) int64, for each patch the numbers among the n of the rows that it is part
            of, -1 for none; None where nothing was merged, or it is not said of what rows are made.
        untold: whether rows were merged of which it is not said.
    """

    row: int
    columns: Tensor
    ids: Tensor | None
    number: int
    shown: bool
    ordinal: int
    picture: Picture
    tokens: Tensor | None = None
    parts: Callable[[], Tensor] | None = None
    untold: bool = False

    @property
    def count(self) -> int:
        """n, tokens that are left."""
        return self.columns.shape[0]

    @property
    def grids(self) -> Grids:
        """The blocks that the tokens still form: all of the picture's, or none once some are cut."""
        return self.picture.grids if self.count == self.picture.count else ()

    def flat(self, length: int) -> Tensor:
        """(n,) the columns as row * length + column."""
        return self.columns + self.row * length if self.row else self.columns

    def keep(self, index: Tensor) -> None:
        """Only the tokens at ``index`` (k,) are left."""
        if self.parts is not None:
            self.follow(partial(_left_at, index, self.count))
        self.columns = self.columns[index]
        self.ids = index if self.ids is None else self.ids.to(index.device)[index]
        if self.tokens is not None:
            self.tokens = self.tokens.to(index.device)[index]

    def take(self, cut: Cut | None) -> None:
        """Note what was merged before the language model."""
        if cut is None:
            return
        self.untold = cut.joins is None and cut.rows is not None
        if cut.joins is None:
            return
        if cut.row_slots is not None:
            # columns ascend, rows are listed in the order of their method
            self.tokens = cut.keep_idx[cut.row_slots.argsort()]
        slots = cut.keep_idx if cut.row_slots is None else cut.row_slots
        self.parts = partial(_rows_named, cut.joins, cut.keep_idx, slots)

    def follow(self, step: Callable[[], Tensor] | None) -> None:
        """Take ``parts`` through a cut, of which ``step`` gives (n,) or (n, J): the rows behind it that each
        of these rows becomes part of, -1 for none. None: it is not said.
        """
        before, count, ids = self.parts, self.picture.count, self.ids
        self.untold = self.untold or step is None
        if self.untold or step is None:
            self.parts = None
        elif before is None:
            self.parts = lambda: through(_places(count, ids), step())
        else:
            self.parts = lambda: through(before(), step())

    @property
    def kept(self) -> Tensor | None:
        """(n,) patches that are left, as reports name them: -1 for rows without a place; None: all."""
        return self.ids if self.tokens is None else self.tokens

    def tell(self, report: Report, layer: int) -> None:
        """Report what this and later layers read, and what rows are made of."""
        layers = report.layer_tokens[self.number]
        layers[layer:] = [self.count] * (len(layers) - layer)
        report.realised_tokens[self.number], report.kept[self.number] = self.count, self.kept
        report.joins.pop(self.number, None)
        if self.joins is not None:
            report.joins[self.number] = self.joins

    @property
    def joins(self) -> Callable[[], Tensor] | None:
        """``parts`` as keep maps name rows."""
        ask, kept = self.parts, self.kept
        return None if ask is None or kept is None else lambda: through(ask(), names_of(kept))


@dataclass(eq=False)
class InsideRecord:
    """What cuts inside the language model know in one forward.

    Args:
        spans: of every picture in every row.
        raters: (B, n) bool, columns that a method chose to rank by; None: the last token of the prompt.
        queries: at least 1, and no fewer than any row has raters; cuts take none of them.
        ranked: what was read for the next cut.
        lengths: tokens of every row, None for a single prompt.
        done: layers whose cut was made, or found unnecessary.
        leaving: rows whose tokens leave at the next cut, of methods that are asked.
    """

    spans: list[Span]
    raters: Tensor | None
    lengths: list[int] | None
    queries: int = 1
    ranked: Ranked | None = None
    done: set[int] = field(default_factory=set)
    leaving: set[int] = field(default_factory=set)


def apply_choice(spans: Sequence[Span], result: Tensor | Merged | Sequence[Tensor], hidden: Tensor) -> Tensor:
    """Let every span know what stays of it; ``hidden`` (B, n, D) with the rows of merging methods."""
    # rows of merging methods stand at places of tokens: positions and masks need no rule of their own
    for number, span in enumerate(spans):
        if not isinstance(result, Merged):
            span.keep(result[number])
            continue
        index, ids = result.slots[number], span.ids
        span.follow(result.unit(number).joins)
        span.columns = span.columns[last_hosts(index, span.count)]
        rows = result.features[number].to(hidden.dtype)
        hidden = hidden.index_put((torch.full_like(span.columns, span.row), span.columns), rows)
        # an earlier cut numbered the tokens anew: reports count in patches of the picture
        span.ids = _at(ids, index)
        if span.tokens is not None:
            span.tokens = _at(span.tokens, index)
    return hidden


def _at(ids: Tensor | None, index: Tensor) -> Tensor:
    """(k,) patches of the rows at ``index`` (k,), -1 for rows without a place."""
    patches = index if ids is None else ids.to(index.device)[index.clamp_min(0)]
    return torch.where(index >= 0, patches, -1)


def _left_at(index: Tensor, count: int) -> Tensor:
    """(n,) the number that each of ``count`` rows has among those at ``index`` (k,), -1 if it is dropped."""
    numbers = torch.arange(index.shape[0], device=index.device)
    return torch.full((count,), -1, device=index.device).scatter(0, index, numbers)


def _places(count: int, ids: Tensor | None) -> Tensor:
    """(N,) the number that each patch has among ``ids`` (n,), all of them where that is None."""
    return torch.arange(count) if ids is None else _left_at(ids, count)


def _rows_named(joins: Callable[[], Tensor], keep_idx: Tensor, row_slots: Tensor) -> Tensor:
    """(N,) or (N, J) the number, in the order of their columns, of the rows (k,) that ``joins`` names."""
    found, names = joins(), names_of(keep_idx)
    # rows without a place have the lowest names, so that these are the first entries; -1 names no row
    shift = 1 + int((keep_idx < 0).sum())
    number = torch.full((found.shape[0] + shift,), -1, device=names.device)
    number[names + shift] = row_slots.to(names.device).argsort().argsort()
    return number.to(found.device)[found + shift]


def last_hosts(index: Tensor, count: int) -> Tensor:
    """(k,) ascending tokens of ``count`` whose places the rows of a merging method take.

    The tokens of ``index`` (k,) keep their own; rows without a token (-1) take the last places that are free,
    so that kept rows before them keep theirs.
    """
    placeless = (index < 0).sum()
    # the last place takes the rows that have no token
    taken = torch.zeros(count + 1, dtype=torch.bool, device=index.device)
    taken[torch.where(index < 0, count, index)] = True
    taken = taken[:-1]
    from_end = (~taken).flip(0).cumsum(dim=0).flip(0)  # how manieth free place, counted from the last
    hosts = taken | (from_end <= placeless)
    return (~hosts).to(torch.int8).argsort(stable=True)[: index.shape[0]]
