# SPDX-License-Identifier: Apache-2.0
"""Every golden vector of every registered method."""

from __future__ import annotations


def test_reference_answers_are_reproduced(case, runners, record_property):
    record_property("golden", case.method)
    assert case.path.exists(), f"{case.path} is named in the index but missing"
    known = runners(case.method)
    assert case.kind in known, (
        f"no runner for kind {case.kind!r}; add it to tests/golden/runners/{case.method}.py"
    )
    known[case.kind](case)
    assert case.checked, f"the runner of {case} compared nothing"
    assert not case.unchecked(), f"the runner of {case} left {case.unchecked()} uncompared"
