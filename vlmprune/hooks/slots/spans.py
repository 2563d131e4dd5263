# SPDX-License-Identifier: Apache-2.0
"""What cuts inside the language model know of one forward: tokens that are left, and rows that rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.method import Merged
from ..vision.pictures import Grids, Picture

if TYPE_CHECKING:
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
    """

    row: int
    columns: Tensor
    ids: Tensor | None
    number: int
    shown: bool
    ordinal: int
    picture: Picture

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
        self.columns = self.columns[index]
        self.ids = index if self.ids is None else self.ids.to(index.device)[index]


@dataclass(eq=False)
class InsideRecord:
    """What cuts inside the language model know in one forward.

    Args:
        spans: of every picture in every row.
        raters: (B, n) bool, columns that a method chose to rank by; None: the last token of the prompt.
        queries: at least 1, and no fewer than any row has raters; cuts take none of them.
        ranked: what was read for the next cut.
        lengths: tokens of every row, None where the device was not asked.
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


def settle(spans: Sequence[Span], result: Tensor | Merged | Sequence[Tensor], hidden: Tensor) -> Tensor:
    """Let every span know what stays of it; ``hidden`` (B, n, D) with the rows of merging methods."""
    for number, span in enumerate(spans):
        if not isinstance(result, Merged):
            span.keep(result[number])
            continue
        index, ids = result.slots[number], span.ids
        span.columns = span.columns[last_hosts(index, span.count)]
        rows = result.features[number].to(hidden.dtype)
        hidden = hidden.index_put((torch.full_like(span.columns, span.row), span.columns), rows)
        patches = index if ids is None else ids.to(index.device)[index.clamp_min(0)]
        span.ids = torch.where(index >= 0, patches, -1)
    return hidden


def last_hosts(index: Tensor, count: int) -> Tensor:
    """(k,) ascending tokens of ``count`` whose places the rows of a merging method take.

    The tokens of ``index`` (k,) keep their own; rows without a token (-1) take the last places that are free,
    so that kept rows before them keep theirs.
    """
    placeless = (index < 0).sum()
    taken = torch.zeros(count + 1, dtype=torch.bool, device=index.device)
    taken[torch.where(index < 0, count, index)] = True
    taken = taken[:-1]
    from_end = (~taken).flip(0).cumsum(dim=0).flip(0)  # how manieth free place, counted from the last
    hosts = taken | (from_end <= placeless)
    return (~hosts).to(torch.int8).argsort(stable=True)[: index.shape[0]]
