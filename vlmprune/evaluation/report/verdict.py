# SPDX-License-Identifier: Apache-2.0
"""The sentences under a leaderboard: what differs from random beyond chance, and what cannot be shown."""

from __future__ import annotations

from collections.abc import Sequence

from ..stats.summary import BLIND, Headline, Row
from .judge import LEVEL, Side, merged, series, side
from .text import plural, ratio

FEW = 10  # sets of pictures; with fewer, intervals are wide, and near 0 and 100 % still somewhat too short


def verdict(rows: Sequence[Row]) -> str:
    """About the rows of one model on one task; every spec that was compared with random is in it."""
    # side -> method -> budgets at which it is on that side
    sides: dict[Side, dict[str, list[str]]] = {"better": {}, "no different": {}, "worse": {}}
    everywhere: dict[str, int] = {}
    for row in merged(rows):
        if row.vs_random:
            method = series(row.spec)
            sides[side(row.vs_random)].setdefault(method, []).append(str(row.keep))
            everywhere[method] = everywhere.get(method, 0) + 1
    texts = []
    split = False
    for name, found in sides.items():
        named = []
        for method, budgets in found.items():
            # at every budget at which it was compared: no need to name them
            whole = len(budgets) == everywhere[method]
            named.append(method if whole else f"{method} ({', '.join(budgets)})")
            split |= not whole
        if named:
            texts.append(f"{name}: {', '.join(named)}")
    if not texts:
        return "No row has random tokens of its own budget to be compared with."
    tail = " In brackets: the budgets where that holds." if split else ""
    return f"Against random tokens (paired, Holm-corrected p < {LEVEL}), {'; '.join(texts)}.{tail}"


def limits(rows: Sequence[Row], headline: Headline | None) -> list[str]:
    """What the rows of one model on one task cannot show, in sentences."""
    said = []
    reach = sorted(row.mdd for row in rows if row.mdd)
    if reach and reach[0] >= 1:  # larger than any difference
        said.append("With so few questions no difference to dense could be found.")
    elif reach:
        low, high = ratio(reach[0]), ratio(min(1.0, reach[-1]))
        size = f"about {low} points" if low == high else f"{low} to {high} points, depending on the row,"
        said.append(f"Differences to dense below {size} would be missed with so many questions.")
    clusters = rows[0].clusters
    if clusters is not None and clusters < FEW:
        said.append(
            f"With only {plural(clusters, 'set')} of pictures the intervals are wide, and near 0 and 100 % "
            "too short."
        )
    silent = [
        f"{row.empty} of {row.answers or row.n} of {row.spec}"
        for row in rows
        if row.empty and row.method != BLIND
    ]
    if silent:
        said.append(f"Answers that are empty count as wrong: {', '.join(silent)}.")
    if headline is not None and not headline.families:
        said.append("The dense model has learnt none of the families, so these accuracies mean nothing.")
    elif headline is not None and headline.excluded:
        left_out = ", ".join(headline.excluded)
        said.append(f"Not counted, since the dense model has not learnt them: {left_out}.")
    return said
