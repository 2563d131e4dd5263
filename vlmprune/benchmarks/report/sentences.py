# SPDX-License-Identifier: Apache-2.0
"""What a run says, in sentences: only what its intervals carry."""

from __future__ import annotations

from typing import Any

from .table import BASELINES, is_best, is_seed, ratio, setting

Row = dict[str, Any]


def sentences(rows: list[Row]) -> list[str]:
    """For each model and task what holds at each budget, then the worst family of all."""
    said = []
    settings = list(dict.fromkeys(map(setting, rows)))
    for where in settings:
        of = [row for row in rows if setting(row) == where and not is_seed(row, rows)]
        prefix = f"{where[0]}, {where[1]}: " if len(settings) > 1 else ""
        said += [prefix + text for text in _dense(of) + _budgets(of) + _worst(of)]
    return said


def _dense(rows: list[Row]) -> list[str]:
    dense = next((row for row in rows if row["spec"] == "dense"), None)
    if dense is None:
        return ["There is no dense row: nothing says what pruning costs."]
    text = f"Without pruning the model answers {ratio(dense['accuracy'])} % of {dense['n']} questions"
    detectable = next((row["mdd"] for row in rows if row.get("mdd")), None)
    tail = f"; differences below about {ratio(detectable)} points cannot be seen with so many" if detectable else ""
    return [text + tail + "."]


def _budgets(rows: list[Row]) -> list[str]:
    said = []
    for keep in dict.fromkeys(row["keep"] for row in rows if row["keep"]):
        of = [row for row in rows if row["keep"] == keep]
        methods = [row for row in of if row["method"] not in BASELINES]
        tested = [row for row in methods if (row.get("vs_random") or {}).get("p_holm") is not None]
        better = [row for row in tested if row["vs_random"]["p_holm"] < 0.05 and row["vs_random"]["difference"] > 0]
        best = next((row for row in of if is_best(row, rows)), None)
        pool = next((row for row in of if row["method"] == "pool"), None)
        parts = []
        if tested:
            parts.append(
                f"{len(better) or 'none'} of {len(tested)} methods {'beat' if len(better) > 1 else 'beats'} random tokens"
            )
        if pool is not None and methods:
            above = sum(row["ci"][0] > pool["accuracy"] for row in methods)
            parts.append(
                f"{above or 'none'} {'lie' if above > 1 else 'lies'} clearly above pooling ({ratio(pool['accuracy'])} %)"
            )
        parts.append(f"{best['spec']} stands alone at the top ({ratio(best['accuracy'])} %)" if best else "no clear winner")
        said.append(f"keep {keep}: " + ", ".join(parts) + ".")
    return said


def _worst(rows: list[Row]) -> list[str]:
    candidates = [
        row
        for row in rows
        if row.get("worst") and row["worst"].get("retained") is not None and row["method"] not in ("dense", *BASELINES)
    ]
    if not candidates:
        return []
    row = min(candidates, key=lambda row: row["worst"]["retained"])
    worst = row["worst"]
    return [f"Hardest hit: {row['spec']} keeps {ratio(worst['retained'], 0)} % of the dense accuracy on {worst['family']}."]
