# SPDX-License-Identifier: Apache-2.0
"""Statistics depend on the answers, not on what tasks, samples or pictures are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.stats.summary import summarise

BLIND = {"count": 0.2, "read": 0.0}


def records() -> list[Record]:
    """Three specs on 60 questions about 20 pictures."""
    rng = np.random.default_rng(5)
    found = []
    for spec, right in (("dense", 0.95), ("random@9", 0.6), ("holov@9", 0.7)):
        for number in range(60):
            found.append(
                Record(
                    spec=spec,
                    id=f"q{number}",
                    cluster=f"picture {number // 3}",
                    family="read" if number % 2 else "count",
                    group="text" if number % 2 else "general",
                    answer="x",
                    score=float(rng.random() < right),
                    dense_tokens=36,
                    realised_tokens=9,
                    layer_tokens=9.0,
                    firings=1,
                    on_object=None,
                    positions="compact",
                    encoding="shared",
                    seconds={},
                )
            )
    return found


def renamed(name: Callable[[str], str]) -> list[Record]:
    return [replace(one, id=name(one.id), cluster=name(one.cluster)) for one in records()]


def test_the_same_data_under_other_names_have_the_same_p_and_intervals():
    """Clusters that are numbered by their sorted names would be drawn in another order."""
    plain = summarise(records(), BLIND, resamples=500)
    assert plain.rows[2].vs_random.p < 1
    for name in (lambda text: f"lmms-{text}", lambda text: text[::-1], lambda text: text.replace("1", "z")):
        assert summarise(renamed(name), BLIND, resamples=500) == plain
