# SPDX-License-Identifier: Apache-2.0
"""Heat map: what each row keeps of the dense accuracy in each family of questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..stats.summary import DENSE, Row
from .judge import settings
from .load import Results

FULL = 0.4  # share of the dense accuracy at which a cell has its full colour


@dataclass(frozen=True)
class Cell:
    """One family of one row.

    Args:
        kept: share of the dense accuracy. worst: the lowest of its row, and below dense. out: not counted.
    """

    kept: float | None
    worst: bool
    out: bool

    @property
    def strength(self) -> float:
        """Opacity: none at 100 %, full at ``FULL`` and below."""
        # a gain is as strong as a loss
        return 0.0 if self.kept is None else round(min(1.0, abs(1 - self.kept) / (1 - FULL)), 3)


@dataclass(frozen=True)
class HeatLine:
    """A row with a cell per family."""

    row: Row
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class HeatMap:
    """One model on one task; ``blind`` is what a guess without a look scores by family."""

    dense: Row
    families: tuple[str, ...]
    lines: tuple[HeatLine, ...]
    excluded: Mapping[str, str]
    blind: Mapping[str, float]


def heat_maps(results: Results, rows: Sequence[Row]) -> list[HeatMap]:
    """``rows`` in the order in which they are shown; settings without a dense row have no map."""
    maps = []
    for where in settings(rows):
        mine = [row for row in rows if row.setting == where]
        dense = next((row for row in mine if row.spec == DENSE), None)
        if dense is None:
            continue
        headline = results.headline_of(where)
        excluded = headline.excluded if headline else {}
        lines = tuple(_line(row, dense, excluded) for row in mine if row is not dense)
        blind = headline.blind if headline else {}
        maps.append(HeatMap(dense, tuple(dense.families), lines, excluded, blind))
    return maps


def _line(row: Row, dense: Row, excluded: Mapping[str, str]) -> HeatLine:
    kept = {family: _kept(row, dense, family) for family in dense.families}
    counted = [share for family, share in kept.items() if share is not None and family not in excluded]
    lowest = min(counted, default=1.0)
    cells = []
    for family, share in kept.items():
        out = family in excluded
        below = share is not None and round(share, 2) < 1  # as it is shown
        cells.append(Cell(share, below and share == lowest and not out, out))  # several may be the lowest
    return HeatLine(row, tuple(cells))


def _kept(row: Row, dense: Row, family: str) -> float | None:
    of, value = dense.families[family], row.families.get(family)
    return value / of if of and value is not None else None
