# SPDX-License-Identifier: Apache-2.0
"""Trained methods, and words that do not rank, on families of every kind.

Where a method of the same slot that needs no training is refused, they may be, too, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from later_families import FIRST, LATER, sampled
from random_weights import TRAINED, spec_with_weights

from vlmprune.errors import UnsupportedError
from vlmprune.testing.conformance import Subject, all_checks, run_check, shared_model

CUTS = ("cut_equals_hand_built", "order_and_report", "second_turn")
ALL = ("batch_row_equals_alone", "nothing_stays", "text_only_is_untouched", "batched_modes_agree")
# method -> its budget, a method that needs no weights, and what it is held to: repairs and exits have no twin
# that cuts alone
HELD = {
    "visionselector": ("@0.25", "divprune@0.25", (*CUTS, *ALL)),
    "textmonkey": ("@0.25", "pool@0.25", (*CUTS, *ALL)),
    "rcp": ("@0.5", "pyramiddrop@0.5", ALL),
    "dyvte": ("", "dyvte(exit=1)", ALL),
    "sparsevlm(skip=[5,6,7])": ("@0.5", "sparsevlm@0.5", (*CUTS, *ALL)),
}


def cases() -> Iterator[Any]:
    """A check of each method on a few families by default, all on all where slow tests are asked for."""
    for method, (_, _, checks) in HELD.items():
        for family in (*FIRST, *LATER):
            for check in checks:
                name = f"{method.partition('(')[0]}-{family}-{check}"
                one_in = 60 if family in FIRST else 600
                slow = () if sampled(f"trained {name}", one_in) else pytest.mark.slow
                yield pytest.param(method, family, check, id=name, marks=slow)


@pytest.mark.parametrize(("method", "family", "check"), cases())
def test_it_passes_or_is_refused_where_its_like_is(
    method: str, family: str, check: str, tmp_path: Path
) -> None:
    budget, plain, _ = HELD[method]
    try:
        config = shared_model(family, None, None).config
    except UnsupportedError as error:
        if "pip install" not in str(error):
            raise
        pytest.skip(str(error))
    spec = spec_with_weights(method, tmp_path, config, budget) if method in TRAINED else method + budget
    found = run_check(check, all_checks()[check], Subject(spec, family))
    if found.status == "unsupported":
        like = run_check(check, all_checks()[check], Subject(plain, family))
        assert like.status == "unsupported", found.detail
    else:
        assert found.status == "pass", found.detail
