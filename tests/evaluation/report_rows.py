# SPDX-License-Identifier: Apache-2.0
"""Rows made by hand, with what a test does not name left at something harmless."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmprune.evaluation.report.load import Results
from vlmprune.evaluation.stats.estimates import Difference
from vlmprune.evaluation.stats.summary import Headline, Row


def row(spec: str, accuracy: float = 0.5, half: float = 0.05, **changes: Any) -> Row:
    """``half``: half of the interval."""
    method, _, keep = spec.partition("@")
    values: dict[str, Any] = {
        "spec": spec,
        "model": "m",
        "task": "t",
        "method": method.partition("(")[0],
        "keep": keep or None,
        "n": 100,
        "accuracy": accuracy,
        "ci": (accuracy - half, accuracy + half),
        "families": {"f": accuracy},
        "realised_tokens": float(keep) if keep.isdigit() else 144.0,
        "firings": 1,
        "empty": 0,
    }
    return Row(**values | changes)


def difference(value: float, half: float = 0.1, p: float = 0.01) -> Difference:
    return Difference(value, (value - half, value + half), p / 2, p, 0.05)


def results(*rows: Row, headline: Sequence[Headline] = (), note: str | None = None) -> Results:
    """Of a run that was never run."""
    return Results(tuple(rows), tuple(headline), (), (), {"note": note} if note else {})
