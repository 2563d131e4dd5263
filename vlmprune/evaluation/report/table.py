# SPDX-License-Identifier: Apache-2.0
"""What a table is made of: columns that know how a row reads, whatever the rows are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Line(Protocol):
    """What any row has that a table is grouped by."""

    @property
    def spec(self) -> str: ...

    @property
    def keep(self) -> str | None: ...

    @property
    def method(self) -> str: ...


R = TypeVar("R")
L = TypeVar("L", bound=Line)


def no_note(rows: Sequence[object]) -> str:
    """Of columns whose heading says it all."""
    return ""


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column.

    Args:
        key: its name in CSV. title: its heading. hint: what it means, in one sentence.
        value: what rows are sorted and compared by; None where a row has nothing.
        text: the cell in full. short: the cell on a terminal and in LaTeX; default as in ``text``.
        wins: whether the highest value of each budget is marked.
        spare: narrow screens drop columns in this order, the highest number first; 0 is never dropped.
        note: a line under a terminal table, about the rows shown; nothing where the heading is enough.
        left: whether cells are words, which stand on the left.
    """

    key: str
    title: str
    hint: str
    value: Callable[[R], float | str | None]
    text: Callable[[R], str]
    short: Callable[[R], str] | None = None
    wins: bool = False
    spare: int = 0
    note: Callable[[Sequence[R]], str] = no_note
    left: bool = False

    def brief(self, row: R) -> str:
        """The cell where there is little room."""
        return self.text(row) if self.short is None else self.short(row)


def used(columns: Sequence[Column[R]], rows: Sequence[R]) -> list[Column[R]]:
    """Columns in which at least one row has a value."""
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


def winners(column: Column[L], rows: Sequence[L]) -> list[bool]:
    """For each row of one table whether its value is the highest of its budget, to the digits shown."""
    if not column.wins:
        return [False] * len(rows)
    scores = [column.value(row) for row in rows]
    numbers = []
    for value, row in zip(scores, rows, strict=True):
        # shown as 78.3 %, so the third decimal of a share is the last that counts; dense has no budget
        numbers.append(round(value, 3) if isinstance(value, float) and row.keep else None)
    found = []
    for number, row in zip(numbers, rows, strict=True):
        rivals = [
            n for n, other in zip(numbers, rows, strict=True) if n is not None and other.keep == row.keep
        ]
        # nobody wins where all are equal
        found.append(number is not None and number == max(rivals) and min(rivals) < number)
    return found
