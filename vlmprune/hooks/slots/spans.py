# SPDX-License-Identifier: Apache-2.0
"""What cuts inside the language model know of one forward: tokens that are left, and rows that rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

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
        queries: the most raters of any row, at least 1; cuts take none of them.
        ranked: what was read for the next cut.
        lengths: tokens of every row, None where the device was not asked.
        done: layers whose cut was made, or found unnecessary.
    """

    spans: list[Span]
    raters: Tensor | None
    lengths: list[int] | None
    queries: int = 1
    ranked: Ranked | None = None
    done: set[int] = field(default_factory=set)
