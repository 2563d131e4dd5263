# SPDX-License-Identifier: Apache-2.0
"""The shared checks of options: what passes, what is refused, and what the error says."""

from __future__ import annotations

import math

import pytest

from vlmprune.checks import check_int, check_layers, check_number, check_positive
from vlmprune.errors import SpecError


def test_values_within_the_bounds_pass():
    check_int("n", -5)
    check_int("n", 1, least=1, most=1)
    check_number("x", 0, least=0)
    check_number("x", 1.0, least=0, most=1)
    check_positive("x", 1e-9)
    check_layers("layers", [2, 6, 15], first=2, count=3)
    check_layers("layers", (0,), first=0)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_int("n", True), "n=True; expected an integer"),
        (lambda: check_int("n", 0, least=1), "n=0; expected an integer of at least 1"),
        (lambda: check_number("x", -0.1, 0, 1), "x=-0.1; expected a number from 0 to 1"),
        (lambda: check_number("x", True, 0, 1), "x=True"),
        (lambda: check_number("x", "1", 0, 1), "x='1'"),
        (lambda: check_number("x", math.inf, 0), "x=inf; expected a number of at least 0"),
        (lambda: check_number("x", math.nan, 0), "x=nan"),
        (lambda: check_positive("x", 0.0), "x=0.0; expected a number above 0"),
        (lambda: check_positive("x", math.inf), "x=inf"),
        (lambda: check_positive("x", None), "x=None"),
        (lambda: check_layers("layers", (), 0), r"layers=\(\); expected ascending decoder layers from 0 on"),
        (lambda: check_layers("layers", (8, 8), 1), r"layers=\(8, 8\)"),
        (lambda: check_layers("layers", (0, 8), 1), "from 1 on"),
        (lambda: check_layers("layers", (1.0, 8), 1), "from 1 on"),
        (lambda: check_layers("layers", (2, 6), 0, count=3), "expected 3 ascending decoder layers"),
    ],
)
def test_other_values_are_named_with_what_was_expected(check, message):
    with pytest.raises(SpecError, match=message):
        check()
