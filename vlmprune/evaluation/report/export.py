# SPDX-License-Identifier: Apache-2.0
"""The rows for other programs and for a README: JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...plain import flat, plain
from ..leaderboard.rundir import FORMAT, Run
from ..stats.summary import Headline, Row
from .agreement import Agreement, agreements, tables_of
from .agreement_text import HEAD, cells, sentences, title, used_head
from .columns import COLUMNS
from .judge import badges, merged, ordered, settings
from .load import Results
from .pivot import Pivot, pivots
from .table import Column, L, used, winners
from .text import ratio

BOLD = "Bold: the highest value of its budget, whether the difference is significant or not."


@dataclass(frozen=True)
class Options:
    """What is written.

    Args:
        table: "rows", a line per spec and task; "tasks", methods x tasks; None, what suits the format.
        intervals: whether methods x tasks shows intervals.
    """

    table: str | None = None
    intervals: bool = False


def as_json(run: Run, results: Results, options: Options) -> str:
    """Everything: rows, what they are over, what failed, the speed card and the provenance."""
    content = {
        "format": FORMAT,
        "provenance": results.provenance,
        "headline": plain(results.headline),
        "rows": plain(ordered(results.rows)),
        "failed": plain(results.failed),
        "agreement": plain(_agreements(results)),
        "speed": plain(results.speed),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _agreements(results: Results) -> list[Agreement]:
    return agreements(results.rows, tables_of(results))


def as_csv(run: Run, results: Results, options: Options) -> str:
    """One line per row with every number in a column of its own, or methods x tasks."""
    if options.table == "tasks":
        return _csv([line for pivot in pivots(results.rows) for line in _pivot_lines(pivot, options)])
    return _csv([_flat_row(row) for row in ordered(results.rows)])


def _flat_row(row: Row) -> dict[str, Any]:
    """Columns for families are called ``family_NAME``."""
    return {re.sub("^families_", "family_", name): value for name, value in flat(row).items()}


def _pivot_lines(pivot: Pivot, options: Options) -> list[dict[str, Any]]:
    """Shares from 0 to 1, as in the rows."""
    lines = []
    for line in pivot.lines:
        values: dict[str, Any] = {"model": pivot.model, "method": line.method, "keep": line.keep}
        for column in pivot.columns():
            values[column.key] = column.value(line)
            row = line.rows.get(column.key)
            if options.intervals and row is not None:
                values[f"{column.key}_ci_low"], values[f"{column.key}_ci_high"] = row.ci
        lines.append(values)
    return lines


def _csv(lines: Sequence[dict[str, Any]]) -> str:
    """Lines may lack columns, such as families of another task."""
    head = list(dict.fromkeys(name for line in lines for name in line))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_inert, head))
    for line in lines:
        writer.writerow([_inert(line.get(name)) for name in head])
    return file.getvalue()


def _inert(value: Any) -> Any:
    """Spreadsheets run text that begins like a formula."""
    risky = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return "'" + value if risky else value


def as_markdown(run: Run, results: Results, options: Options) -> str:
    """Methods x tasks where there are several, one table per model and task, and what the run was."""
    note = results.provenance.get("note")
    parts = [f"**{_cell(str(note))}**"] if note else []
    # without a choice Markdown has both tables
    if options.table != "rows":
        for pivot in pivots(results.rows):
            shown = pivot.columns(options.intervals)
            about = f"Accuracy in %: {_cell(pivot.sizes)}. % of dense is the mean over the tasks. {BOLD}"
            parts += [f"### {_cell(pivot.model)}", about, _table(shown, pivot.lines)]
    if options.table != "tasks":
        rows = merged(ordered(results.rows))
        for where in settings(rows):
            mine = [row for row in rows if row.setting == where]
            marks = []
            for row in mine:
                said = [text for kind, text in badges(row, mine) if kind != "baseline"]
                marks.append("".join(f" ({_cell(text)})" for text in said))
            chance = _chance(results.headline_of(where))
            heading = f"### {_cell(where[0])}, {_cell(where[1])}, n = {mine[0].n}{chance}"
            parts += [heading, _table(used(COLUMNS, mine), mine, marks), BOLD]
    if options.table != "tasks":
        parts += _agreement_parts(_agreements(results))
    parts.append(_facts(results))
    return "\n\n".join(filter(None, parts)) + "\n"


def _agreement_parts(found: Sequence[Agreement]) -> list[str]:
    parts = []
    for model in dict.fromkeys(one.model for one in found):
        mine = [one for one in found if one.model == model]
        columns = used_head(mine)
        lines = [[HEAD[i] for i in columns], ["--:" for _ in columns]]
        lines += [[cells(one)[i] for i in columns] for one in mine]
        table = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
        parts += [f"### {_cell(title(mine[0]))}", table, _cell(" ".join(sentences(mine)))]
    return parts


def _chance(headline: Headline | None) -> str:
    if headline is None or headline.chance is None:
        return ""
    return f", chance {ratio(headline.chance)} %"


def _table(columns: Sequence[Column[L]], rows: Sequence[L], marks: Sequence[str] = ()) -> str:
    """``marks`` stand behind the first cell of each row."""
    # "--:" puts a column on the right
    lines = [[_cell(column.title) for column in columns], ["---" if c.left else "--:" for c in columns]]
    wins = [winners(column, rows) for column in columns]
    for number, row in enumerate(rows):
        cells = []
        for column, won in zip(columns, wins, strict=True):
            # only the number in bold, not its interval
            head, space, rest = _cell(column.text(row)).partition(" ")
            cells.append(f"**{head}**{space}{rest}" if won[number] else head + space + rest)
        cells[0] += marks[number] if marks else ""
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _facts(results: Results) -> str:
    known = results.provenance
    versions = known.get("versions")
    parts = []
    if isinstance(versions, dict):
        parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    parts += [f"{key}: {known[key]}" for key in ("commit", "date", "hardware", "command") if known.get(key)]
    return _cell("; ".join(parts))


def _cell(text: str) -> str:
    """Text that stays text in Markdown and in the HTML that is made of it."""
    # the backslash first, or it would escape those that are put in
    for letter in "\\`*_[]|":
        text = text.replace(letter, "\\" + letter)
    # "&" first, for the same reason
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
