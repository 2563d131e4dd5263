# SPDX-License-Identifier: Apache-2.0
"""Rounds of the warm-up are not timed, whatever they took."""

from __future__ import annotations

import pytest

from vlmprune.speed import timing


def test_the_seconds_of_the_warm_up_are_not_among_those_of_the_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, took = 0.0, iter([100.0, 50.0, 1.0, 2.0, 3.0])

    def call() -> None:
        nonlocal now
        now += next(took)

    monkeypatch.setitem(timing.CLOCKS, "wall", lambda: now)
    assert timing.race({"one": (None, call)}, 3, warmup=2) == {"one": [1.0, 2.0, 3.0]}
