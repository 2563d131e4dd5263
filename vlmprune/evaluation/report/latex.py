# SPDX-License-Identifier: Apache-2.0
"""Tables for a paper: LaTeX with booktabs, methods x tasks where there are several, budgets in groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

from ..leaderboard.rundir import Run
from ..stats.summary import Headline, Row
from .columns import COLUMNS
from .export import BOLD, Options
from .judge import LEVEL, merged, ordered, settings
from .load import Results
from .pivot import Pivot, pivots
from .table import Column, L, used, winners
from .text import ratio

WIDE = 8  # columns that a terminal drops before this one do not fit on a page either
# what LaTeX would read as a command, and what its fonts lack
SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{letter: "\\" + letter for letter in "$&#_%"},
    "\N{EN DASH}": "--",
    "\N{MINUS SIGN}": "$-$",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\N{UPWARDS ARROW}": r"$\uparrow$",
    "\N{DOWNWARDS ARROW}": r"$\downarrow$",
}
INTERVALS = r"In brackets: 95\,\% intervals over sets of pictures."


def as_latex(run: Run, results: Results, options: Options) -> str:
    """One ``table`` environment per model, or per model and task."""
    across = pivots(results.rows)
    if options.table == "tasks" or (options.table is None and across):
        tables = [_pivot(pivot, options) for pivot in across]
    else:
        rows = merged(ordered(results.rows))
        tables = []
        for where in settings(rows):
            mine = [row for row in rows if row.setting == where]
            tables.append(_rows(mine, results.headline_of(where), options))
    note = results.provenance.get("note")
    # lines of a comment
    head = ["% needs \\usepackage{booktabs}"] + ([f"% {_line(str(note))}"] if note else [])
    return "\n".join(head + tables)


def _pivot(pivot: Pivot, options: Options) -> str:
    caption = [
        f"Visual token pruning of {escape(pivot.model)}: accuracy in \\% on {escape(pivot.sizes)}.",
        "Average: unweighted mean over the tasks; \\% of dense: mean over the tasks of the accuracy as a "
        "percentage of that without pruning.",
        *([INTERVALS] if options.intervals else []),
        BOLD,
    ]
    return _environment(pivot.columns(options.intervals), pivot.lines, caption, f"tab:{_label(pivot.model)}")


def _rows(rows: Sequence[Row], headline: Headline | None, options: Options) -> str:
    model, task = rows[0].setting
    counted = f"$n = {rows[0].n}$"
    if rows[0].clusters is not None:
        counted += f" questions about {rows[0].clusters} sets of pictures"
    if headline is not None and headline.chance is not None:
        counted += f"; chance {ratio(headline.chance)}\\,\\%"
    seeds = "; random against itself: accuracies of its seeds" if any(row.band for row in rows) else ""
    caption = [
        f"Visual token pruning of {escape(model)} on {escape(task)} ({counted}).",
        f"Arrows: paired differences with $p < {LEVEL}$ after Holm's correction{seeds}.",
        *([INTERVALS] if options.intervals else []),
        BOLD,
    ]
    columns = [column for column in used(COLUMNS, rows) if column.spare <= WIDE]
    shown = columns if options.intervals else [_without_intervals(column) for column in columns]
    return _environment(shown, rows, caption, f"tab:{_label(model)}-{_label(task)}")


def _without_intervals(column: Column[Row]) -> Column[Row]:
    # " [61.2, 64.8]"
    return replace(column, short=lambda row: re.sub(r" \[[^]]*\]", "", column.brief(row)))


def _environment(columns: Sequence[Column[L]], rows: Sequence[L], caption: Sequence[str], label: str) -> str:
    wins = {column.key: winners(column, rows) for column in columns}
    body = []
    # a rule between budgets
    for _, group in groupby(enumerate(rows), key=lambda pair: pair[1].keep):
        body.append("    \\midrule")
        for number, row in group:
            cells = []
            for column in columns:
                text = escape(column.brief(row))
                if column.key == "spec":
                    text = f"\\texttt{{{text}}}"
                elif wins[column.key][number]:
                    # only the number in bold, not its interval
                    head, space, rest = text.partition(" ")
                    text = f"\\textbf{{{head}}}{space}{rest}"
                cells.append(text)
            body.append(f"    {' & '.join(cells)} \\\\")
    lines = [
        "\\begin{table}[t]",
        "  \\centering",
        "  \\small",
        "  \\setlength{\\tabcolsep}{4pt}",
        f"  \\caption{{{' '.join(caption)}}}",
        f"  \\label{{{label}}}",
        f"  \\begin{{tabular}}{{{''.join('l' if column.left else 'r' for column in columns)}}}",
        "    \\toprule",
        f"    {' & '.join(escape(column.title) for column in columns)} \\\\",
        *body,
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
        "",
    ]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(SPECIAL.get(letter, letter) for letter in _line(text))


def _line(text: str) -> str:
    """On one line: a line end would end a comment, or begin a paragraph in a caption."""
    return " ".join(text.split())


def _label(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")
