# SPDX-License-Identifier: Apache-2.0
"""The one sentence under a leaderboard: which methods differ from random tokens beyond what chance gives, and which do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..report.table import is_seed, series

LEVEL = 0.05


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """About the rows of one model on one task; every spec that was compared with random is in it, once per budget."""
    sides: dict[str, dict[str, list[str]]] = {"better": {}, "no different": {}, "worse": {}}
    for row in rows:
        if row["vs_random"] and not is_seed(row, rows):
            sides[side(row["vs_random"])].setdefault(series(row["spec"]), []).append(row["keep"])
    texts = [f"{name}: {_listed(found)}" for name, found in sides.items() if found]
    if not texts:
        return "No row has random tokens of its own budget to be compared with."
    return f"Against random tokens (paired, Holm-corrected p < {LEVEL}) - {'; '.join(texts)}."


def side(against: dict[str, Any]) -> str:
    """Only a difference whose interval leaves out zero and that survives the correction counts."""
    low, high = against["ci"]
    if against["p_holm"] >= LEVEL or low <= 0 <= high:
        return "no different"
    return "better" if low > 0 else "worse"


def _listed(found: dict[str, list[str]]) -> str:
    return ", ".join(f"{method} at {' and '.join(budgets)}" for method, budgets in found.items())
