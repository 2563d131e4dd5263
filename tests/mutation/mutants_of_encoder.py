# SPDX-License-Identifier: Apache-2.0
"""Mistakes in what shortens inside the vision tower: counts, places, and what stays behind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import mutant_targets as at
from mutant import Checks, Mutant, Pytest

Function = Callable[..., Any]


def flowcut(check: str) -> Checks:
    return Checks("flowcut@9", "llava", check)


def nothing(original: Function) -> Function:
    return lambda *args: None


def one_less_dropped(drops: Function) -> Function:
    return lambda *args: drops(*args) - 1


def one_less_left(shorten: Function) -> Function:
    return lambda self, block, k: shorten(self, block, k - 1)


def left_short(restore: Function) -> Function:
    return lambda self, rows: rows


def one_run_for_all(init: Function) -> Function:
    def changed(self: Any, *args: Any) -> None:
        init(self, *args)
        self._local = SimpleNamespace()

    return changed


ALONE = flowcut("batch_row_equals_alone")
MUTANTS = (
    Mutant(
        "one patch too many left in the tower",
        at.FLOWCUT_DROPS,
        one_less_dropped,
        Pytest(
            "tests/golden/test_vectors.py::test_reference_answers_are_reproduced[flowcut-e2e_rows_grid8_t12_b2]"
        ),
    ),
    Mutant(
        "one patch too many averaged",
        at.TOME_SHORTEN,
        one_less_left,
        Checks("tome@9", "llava", "batch_row_equals_alone"),
    ),
    Mutant("what left the tower gets no place back", at.ENCODER_RESTORE, left_short, ALONE),
    Mutant("tap on attention left behind", at.TAP_REMOVE, nothing, flowcut("nothing_stays")),
    Mutant("one thread's tower for all", at.ENCODER_SLOT, one_run_for_all, flowcut("threads_do_not_meet")),
)
