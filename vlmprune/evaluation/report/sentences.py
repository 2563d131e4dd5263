# SPDX-License-Identifier: Apache-2.0
"""What a run says, in sentences: only claims that its intervals support."""

from __future__ import annotations

from collections.abc import Sequence

from ..stats.summary import DENSE, Headline, Row
from .judge import BASELINES, is_best, merged, settings, side
from .load import Results
from .text import ratio
from .verdict import limits


def sentences(results: Results) -> list[str]:
    """For each model and task what holds at each budget, then the family that lost most."""
    said = []
    places = settings(results.rows)
    for where in places:
        rows = merged([row for row in results.rows if row.setting == where])
        prefix = f"{where[0]}, {where[1]}: " if len(places) > 1 else ""
        texts = _dense(rows, results.headline_of(where)) + _budgets(rows) + _worst(rows)
        said += [prefix + text for text in texts]
    return said


def _dense(rows: Sequence[Row], headline: Headline | None) -> list[str]:
    dense = next((row for row in rows if row.spec == DENSE), None)
    if dense is None:
        return ["There is no dense row: nothing says what pruning costs."]
    text = f"Without pruning the model answers {ratio(dense.accuracy)} % of {dense.n} questions"
    if headline is not None and headline.chance is not None:
        text += f", the best guess without a look at the picture {ratio(headline.chance)} %"
    return [" ".join([text + ".", *limits(rows, headline)])]


def _budgets(rows: Sequence[Row]) -> list[str]:
    said = []
    for keep in dict.fromkeys(row.keep for row in rows if row.keep):
        mine = [row for row in rows if row.keep == keep]
        methods = [row for row in mine if row.method not in BASELINES]
        tested = [row.vs_random for row in methods if row.vs_random]
        parts = []
        if tested:
            better = sum(side(one) == "better" for one in tested)
            beat = "beat" if better > 1 else "beats"
            parts.append(f"{better or 'none'} of {len(tested)} methods {beat} random tokens")
        pool = next((row for row in mine if row.method == "pool"), None)
        if pool is not None and methods:
            # the whole interval above it
            above = sum(row.ci[0] > pool.accuracy for row in methods)
            lie = "lie" if above > 1 else "lies"
            parts.append(f"{above or 'none'} {lie} clearly above pooling ({ratio(pool.accuracy)} %)")
        best = next((row for row in mine if is_best(row, rows)), None)
        if best:
            parts.append(f"{best.spec} stands alone at the top ({ratio(best.accuracy)} %)")
        else:
            parts.append("no clear winner")
        said.append(f"keep {keep}: " + ", ".join(parts) + ".")
    return said


def _worst(rows: Sequence[Row]) -> list[str]:
    """Nothing where no method lost anything."""
    found = []
    for row in rows:
        worst = row.worst
        if (
            row.method not in (DENSE, *BASELINES)
            and worst
            and worst.retained is not None
            and worst.retained < 1
        ):
            found.append((worst.retained, row.spec, worst.family))
    if not found:
        return []
    retained, spec, family = min(found)  # the lowest share
    return [f"Hardest hit: {spec} keeps {ratio(retained, 0)} % of the dense accuracy on {family}."]
