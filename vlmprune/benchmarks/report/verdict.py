# SPDX-License-Identifier: Apache-2.0
"""The one sentence under a leaderboard: which methods differ from random tokens beyond what chance gives, and which do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report.table import is_seed, series

LEVEL = 0.05


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """About the rows of one model on one task; every spec that was compared with random is in it."""
    sides: dict[str, dict[str, list[str]]] = {"better": {}, "no different": {}, "worse": {}}
    everywhere: dict[str, int] = {}
    for row in rows:
        if row["vs_random"] and not is_seed(row, rows):
            method = series(row["spec"])
            sides[side(row["vs_random"])].setdefault(method, []).append(row["keep"])
            everywhere[method] = everywhere.get(method, 0) + 1
    texts, split = [], False
    for name, found in sides.items():
        named = [m if len(at) == everywhere[m] else f"{m} ({', '.join(at)})" for m, at in found.items()]
        split |= any(len(at) < everywhere[m] for m, at in found.items())
        texts += [f"{name}: {', '.join(named)}"] if named else []
    if not texts:
        return "No row has random tokens of its own budget to be compared with."
    tail = " In brackets: the budgets where that holds." if split else ""
    return f"Against random tokens (paired, Holm-corrected p < {LEVEL}), {'; '.join(texts)}.{tail}"


def side(against: dict[str, Any]) -> str:
    """Only a difference whose interval leaves out zero and that survives the correction counts."""
    low, high = against["ci"]
    if against["p_holm"] >= LEVEL or low <= 0 <= high:
        return "no different"
    return "better" if low > 0 else "worse"

