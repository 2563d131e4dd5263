# SPDX-License-Identifier: Apache-2.0
"""Which family a row names as its worst."""

from __future__ import annotations

import pytest

from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.stats.summary import summarise


def answers(spec: str, family: str, right: int, of: int) -> list[Record]:
    """``of`` questions of a family, the first ``right`` of which are answered right."""
    plain = {"dense_tokens": 36, "realised_tokens": 9, "layer_tokens": 9.0, "firings": 3, "on_object": None}
    kind = {"family": family, "group": "general", "positions": "compact", "encoding": "shared", "seconds": {}}
    return [
        Record(
            spec=spec,
            id=f"{family}{i}",
            cluster=f"{family}{i}",
            answer="yes",
            score=float(i < right),
            **plain,
            **kind,
        )
        for i in range(of)
    ]


def test_the_worst_family_is_the_one_that_retains_least_not_the_hardest_one() -> None:
    records = [*answers("dense", "easy", 40, 40), *answers("dense", "hard", 16, 40)]
    records += [*answers("uniform@9", "easy", 24, 40), *answers("uniform@9", "hard", 16, 40)]
    found = summarise(records, {"easy": 0.0, "hard": 0.0}, resamples=100)
    rows = {row.spec: row for row in found.rows}
    assert rows["uniform@9"].families == {"easy": 0.6, "hard": 0.4}
    worst = rows["uniform@9"].worst
    assert (worst.family, worst.accuracy) == ("easy", 0.6) and worst.retained == pytest.approx(0.6)
