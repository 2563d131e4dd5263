# SPDX-License-Identifier: Apache-2.0
"""How a leaderboard looks on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..evaluation.report.agreement import agreements, tables_of
from ..evaluation.report.columns import COLUMNS
from ..evaluation.report.export import BOLD
from ..evaluation.report.judge import BASELINES, merged, ordered, settings
from ..evaluation.report.load import Results
from ..evaluation.report.pivot import Across, Pivot, pivots
from ..evaluation.report.table import Column, L, used, winners
from ..evaluation.report.text import plural, ratio
from ..evaluation.report.verdict import limits, verdict
from ..evaluation.stats.summary import Headline, Row
from . import agreement
from .screen import plain, table

NARROWEST = 5  # a heading breaks within words only where its column would be narrower


def show(found: Mapping[str, Any], screen: Console) -> None:
    """All tables of a run with what they say; ``found`` is what ``results.json`` holds."""
    results = Results.read(found, "results")
    for where in settings(results.rows):
        # single seeds give way to their mean
        rows = merged(ordered([row for row in results.rows if row.setting == where]))
        _show_rows(rows, results.headline_of(where), screen)
    # models that answered several tasks
    for pivot in pivots(results.rows):
        _show_pivot(pivot, screen)
    # beside what is published
    tables = tables_of(results)
    agreed = agreements(results.rows, tables)
    for model in tables:
        agreement.show([one for one in agreed if one.model == model], screen)
    # what has no row, and why
    for lost in results.failed:
        text = f"no row for {lost.spec} ({lost.model}, {lost.task}): {lost.error}"
        screen.print(plain(text), style="red")


def _show_rows(rows: Sequence[Row], headline: Headline | None, screen: Console) -> None:
    screen.print(plain(_heading(rows[0], headline, screen)), style="bold")
    columns = fitting(used(COLUMNS, rows), rows, screen)
    screen.print(grid(columns, rows))
    for line in legend(columns, rows):
        screen.print(plain(line), style="dim")
    screen.print(plain(verdict(rows)))
    for sentence in limits(rows, headline):
        screen.print(plain(sentence), style="dim")
    screen.print()


def _heading(row: Row, headline: Headline | None, screen: Console) -> str:
    about = [plural(row.n, "question")]
    if row.clusters is not None:
        about[0] += f" about {plural(row.clusters, 'set')} of pictures"
    if headline is not None and headline.chance is not None:
        about.append(f"chance {ratio(headline.chance)} %")
    bold = ", in bold the highest of a budget" if screen.is_terminal else ""  # a file has no bold
    return f"{row.model} on {row.task}: {', '.join(about)}; in brackets 95 % intervals{bold}"


def legend(columns: Sequence[Column[L]], rows: Sequence[L]) -> list[str]:
    """A line for each column shown whose heading does not say it all."""
    noted = [(column.title.partition(",")[0], column.note(rows)) for column in columns]
    return [f"{title}: {note}" for title, note in noted if note]


def _show_pivot(pivot: Pivot, screen: Console) -> None:
    screen.print(plain(f"{pivot.model}, all tasks: accuracy, %, of {pivot.sizes}"), style="bold")
    for columns in _blocks(pivot, screen):
        screen.print(grid(columns, pivot.lines))
    about = "Average: unweighted over the tasks; % of dense: mean over the tasks."
    screen.print(plain(f"{about} {BOLD}" if screen.is_terminal else about), style="dim")
    screen.print()


def _blocks(pivot: Pivot, screen: Console) -> Iterator[list[Column[Across]]]:
    """As many tasks beside one another as fit; the spec begins every block, the averages end the last."""
    first, *rest = pivot.columns()
    block = [first]
    for column in rest:
        # a task that is too wide alone still gets a block of its own
        if len(block) > 1 and _width([*block, column], pivot.lines, screen) > screen.width:
            yield block
            block = [first]
        block.append(column)
    yield block


# --- any table ------------------------------------------------------------------------------------


def fitting(columns: Sequence[Column[L]], rows: Sequence[L], screen: Console) -> list[Column[L]]:
    """All columns in full where there is room, else in short, else without those that can be spared."""
    # without a short form, the full text stands in every cell
    left = [replace(column, short=None) for column in columns]
    if _width(left, rows, screen) <= screen.width:
        return left
    left = list(columns)
    while _width(left, rows, screen) > screen.width and any(column.spare for column in left):
        left.remove(max(left, key=lambda column: column.spare))
    return left


def _width(columns: Sequence[Column[L]], rows: Sequence[L], screen: Console) -> int:
    # so wide that nothing folds while it is measured
    return Measurement.get(screen, screen.options.update(width=10_000), grid(columns, rows)).maximum


def grid(columns: Sequence[Column[L]], rows: Sequence[L]) -> Table:
    """Cells under headings that are broken to their width; budgets apart, the best of each in bold."""
    cells = [[column.brief(row) for row in rows] for column in columns]
    made = table(padding=(0, 0, 0, 1))
    for number, (column, texts) in enumerate(zip(columns, cells, strict=True)):
        heading = _broken(column.title, max(map(len, texts), default=0))
        justify: Any = "left" if column.left else "right"
        # only the first column may fold: a number over several lines cannot be read
        made.add_column(
            plain(heading), overflow="fold", justify=justify, no_wrap=number > 0, vertical="bottom"
        )
    wins = [winners(column, rows) for column in columns]
    for number, row in enumerate(rows):
        # a rule between budgets; rows of a speed card have none
        if number and row.keep != rows[number - 1].keep:
            made.add_section()
        line = []
        for texts, won in zip(cells, wins, strict=True):
            text: Text = plain(texts[number])
            if won[number]:
                text.stylize("bold")
            line.append(text)
        made.add_row(*line, style="dim" if row.method in BASELINES else None)
    return made


def _broken(title: str, width: int) -> str:
    """Over several lines, at spaces, and within words only where a word is wider than its column may be."""
    return "\n".join(
        textwrap.wrap(title, max(width, NARROWEST, *map(len, title.split())), break_long_words=False)
    )
