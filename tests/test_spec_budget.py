# SPDX-License-Identifier: Apache-2.0
"""Budget: an int counts tokens, a float is the fraction kept, and neither is ever taken for the other."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmprune.errors import SpecError
from vlmprune.spec import Budget


@pytest.mark.parametrize(
    ("text", "keep", "printed"),
    [
        ("64", 64, "64"),
        ("1", 1, "1"),
        ("0.25", 0.25, "0.25"),
        (".5", 0.5, "0.5"),
        ("1.0", 1.0, "1.0"),
        ("1.", 1.0, "1.0"),
        ("1e-1", 0.1, "0.1"),
        ("1E-7", 1e-7, "1e-07"),
        (" 64 / crop ", 64, "64/crop"),
        ("0.5/total", 0.5, "0.5/total"),
        ("64/image", 64, "64"),
    ],
)
def test_budget_text(text: str, keep: float, printed: str) -> None:
    budget = Budget.of(text)
    assert budget.keep == keep and type(budget.keep) is type(keep)
    assert str(budget) == printed
    assert Budget.of(printed) == budget


@pytest.mark.parametrize(
    "value",
    [
        0,
        -1,
        0.0,
        -0.5,
        1.5,
        64.0,
        math.nan,
        math.inf,
        -math.inf,
        True,
        False,
        None,
        pytest.param(10**5000, id="long"),
        1 + 0j,
        [64],
        np.bool_(True),
        np.array(3),
        "",
        "0",
        "-1",
        "+5",
        "0.0",
        "1.5",
        "64.0",
        "nan",
        "inf",
        "1e999",
        "1e-999",
        "1_000",
        "0x10",
        "6 4",
        "٣",
        ".",
        "e5",
        "9" * 5000,
        "0" * 30 + "1",
        "True",
        "64/",
        "64/tile",
        "64/crop/crop",
        "/crop",
        "64@64",
    ],
)
def test_what_is_no_budget(value: object) -> None:
    with pytest.raises(SpecError):
        Budget.of(value)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("25%", "@0.25"),
        ("12.5 %", "@0.125"),
        ("64.0", "an int: @64"),
        (576.0, "an int: @576"),
        ("a quarter", "@64 or @0.25"),
        ("64/crops", "Did you mean 'crop'"),
    ],
)
def test_wrong_budgets_get_a_hint(value: object, hint: str) -> None:
    with pytest.raises(SpecError, match=hint):
        Budget.of(value)


@pytest.mark.parametrize(
    ("value", "keep"),
    [
        (np.int64(64), 64),
        (np.uint8(3), 3),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (Fraction(1, 9), 1 / 9),
    ],
)
def test_numbers_of_other_kinds_become_python_numbers(value: object, keep: float) -> None:
    assert type(Budget(value).keep) is type(keep)
    assert Budget(value) == Budget(keep)


def test_budget_of_takes_a_scope_unless_the_value_names_one() -> None:
    assert Budget.of(64, scope="crop") == Budget.of("64", scope="crop") == Budget(64, "crop")
    assert Budget.of("64/image", scope="crop") == Budget.of(Budget(64), scope="crop") == Budget(64)


def test_one_token_is_not_all_tokens() -> None:
    assert Budget(1) != Budget(1.0)
    assert len({Budget(1), Budget(1.0), Budget(1, "crop"), Budget(1)}) == 3
    assert Budget(1).count(576) == 1
    assert Budget(1.0).count(576) == 576


@pytest.mark.parametrize(
    ("keep", "n", "count"),
    [
        (64, 576, 64),
        (64, 10, 10),
        (0.25, 576, 144),
        (1 / 9, 576, 64),
        (0.111, 576, 63),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.999, 2, 1),
        (1e-9, 576, 1),
        (1.0, 577, 577),
        (0.1, 30, 3),
        (0.5, 0, 0),
        (5, 0, 0),
    ],
)
def test_count(keep: float, n: int, count: int) -> None:
    assert Budget(keep).count(n) == count


@given(st.integers(1, 3000), st.data())
def test_count_is_exact_for_fractions_of_n(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    assert Budget(k / n).count(n) == k


@given(st.integers(1, 2**63 - 1) | st.floats(0, 1, exclude_min=True))
def test_a_printed_budget_parses_to_the_same_number(keep: float) -> None:
    printed = str(Budget(keep))
    assert Budget.of(printed).keep == keep and type(Budget.of(printed).keep) is type(keep)
    assert isinstance(keep, int) or "." in printed or "e" in printed
