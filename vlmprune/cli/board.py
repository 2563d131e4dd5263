# SPDX-License-Identifier: Apache-2.0
"""How a leaderboard looks on a terminal of 100 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..benchmarks.report.table import BASELINES, NOTHING, count, is_seed, ordered, ratio, setting, signed
from ..benchmarks.sweep.verdict import side, verdict
from .screen import plain, table

Row = dict[str, Any]
HEADINGS = ("spec", "tokens", "accuracy, %", "left", "vs random", "lost/won", "text", "hard", "worst family")
# in the order in which a narrow screen loses them
SPARE = ("hard", "lost/won", "worst family", "text", "tokens", "left", "vs random")
MARKS = {"better": "\N{UPWARDS ARROW}", "worse": "\N{DOWNWARDS ARROW}", "no different": " "}


def show(found: dict[str, Any], screen: Console) -> None:
    """All tables of a run, each with one sentence under it."""
    rows = found["rows"]
    for where in dict.fromkeys(map(setting, rows)):
        mine = ordered([row for row in rows if setting(row) == where])
        screen.print(plain(f"{where[0]} on {where[1]}"), style="bold")
        screen.print(_fitting(mine, screen))
        screen.print(plain(_conditions(mine, next(one for one in found["headline"] if setting(one) == where))), style="dim")
        screen.print(plain(verdict(mine)))
    for lost in found["failed"]:
        screen.print(plain(f"no row for {lost['spec']} ({lost['model']}, {lost['task']}): {lost['error']}"), style="red")


def _fitting(rows: list[Row], screen: Console) -> Table:
    """With all columns where they fit, else without those that can be spared: no spec is ever cut."""
    left = list(HEADINGS)
    for spare in (None, *SPARE):
        left = [heading for heading in left if heading != spare]
        made = _table(rows, left)
        if Measurement.get(screen, screen.options.update(width=1000), made).maximum <= screen.width:
            break
    return made


def _table(rows: list[Row], headings: list[str]) -> Table:
    made = table(*headings, padding=(0, 0, 0, 1))
    for column in made.columns:
        column.justify, column.no_wrap = "left" if column.header in ("spec", "worst family") else "right", True
    made.columns[0].no_wrap = False
    keep = rows[0]["keep"]
    for row in rows:
        if is_seed(row, rows):
            continue
        if row["keep"] != keep:
            made.add_section()
            keep = row["keep"]
        cells = dict(zip(HEADINGS, _cells(row), strict=True))
        style = "dim" if row["method"] in BASELINES else None
        made.add_row(*(plain(cells[heading]) for heading in headings), style=style)
    return made


def _cells(row: Row) -> list[str]:
    low, high = row["ci"]
    against, flips, hard, worst = row["vs_random"], row["flips"], row["hard"], row["worst"]
    dense = row["spec"] == "dense"
    band = row["band"]
    versus = NOTHING
    if band:
        versus = f"{ratio(band['low'], 0)}-{ratio(band['high'], 0)}"
    elif against:
        versus = f"{signed(against['difference'])} {MARKS[side(against)]}"
    return [
        row["spec"],
        count(row["realised_tokens"]),
        f"{ratio(row['accuracy'])} [{ratio(low, 0)}, {ratio(high, 0)}]",
        NOTHING if dense else ratio(row["retained"], 0),
        versus,
        NOTHING if dense or not flips else f"{flips['lost']}/{flips['won']}",
        ratio(row["groups"].get("text"), 0),
        ratio(hard["accuracy"], 0) if hard else NOTHING,
        NOTHING if dense else f"{worst['family']} {ratio(worst['retained'], 0)}",
    ]


def _conditions(rows: list[Row], headline: dict[str, Any]) -> str:
    """What the numbers are, and what such a table cannot show."""
    reach = sorted(row["mdd"] for row in rows if row["mdd"])
    said = f"{rows[0]['n']} questions; in brackets 95 % intervals, over pictures; left: % of the dense accuracy; vs random: "
    said += "points, arrows where beyond chance, the range of its seeds for random itself; hard: % of what pool gets wrong; "
    said += "worst family: % left of it."
    if reach:
        said += f" Smallest difference to dense that is found: {100 * reach[0]:.1f} to {100 * reach[-1]:.1f} points, by row."
    if not headline["families"]:
        said += " The dense model has learnt none of the families, so these accuracies mean nothing."
    elif headline["excluded"]:
        said += f" Not counted, since the dense model has not learnt them: {', '.join(headline['excluded'])}."
    return said
