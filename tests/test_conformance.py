# SPDX-License-Identifier: Apache-2.0
"""Every method on every family: the named checks that ``vlmprune verify`` runs, one test each."""

from __future__ import annotations

import pytest

from vlmprune.registry import get, list_methods
from vlmprune.testing.conformance import Subject, all_checks, default_spec, run_check, run_checks
from vlmprune.testing.tiny import FAMILIES, VARIANTS

METHODS = [name for name in list_methods() if get(name).__module__.startswith("vlmprune.")]
OPTIONS = ["fastervlm(cls=mean)@9", "visionzip(cls=mean)@12", "visionzip(contextual=2,combine=mean)@12", "random(seed=3)@0.3",
           "fastervlm@4/crop", "random@5/crop", "random@20/total", "divprune@20/total", "pool@5/crop"]  # fmt: skip
QUICK = [Subject(default_spec(method), family) for method in METHODS for family in FAMILIES]
MORE = [
    *(Subject(spec, family) for spec in OPTIONS for family in ("llava", "llava_next", "llava_onevision")),
    *(Subject(spec, *variant) for variant in VARIANTS for spec in ("fastervlm@9", "random@9")),
]


def name_of(subject: Subject) -> str:
    return "-".join(filter(None, (subject.spec, subject.family, subject.tower, subject.text)))


def has_cls(subject: Subject) -> bool:
    return (subject.tower or ("siglip" if subject.family == "llava_onevision" else "clip")) == "clip"


@pytest.mark.parametrize("check", all_checks())
@pytest.mark.parametrize(
    "subject",
    [pytest.param(s, id=name_of(s)) for s in QUICK] + [pytest.param(s, id=name_of(s), marks=pytest.mark.slow) for s in MORE],
)
def test_conformance(subject: Subject, check: str) -> None:
    result = run_check(check, all_checks()[check], subject)
    needs_cls = "cls_attention" in subject.method.needs
    if result.status == "unsupported" and needs_cls and not has_cls(subject):
        assert "cls='mean'" in result.detail
        return
    if result.status == "unsupported" and check == "threads_do_not_meet":
        pytest.skip(result.detail)  # transformers 4.57 is not thread-safe by itself
    if result.status == "unsupported" and subject.method.kind() == "merge" and "total" in subject.spec:
        return
    assert result.status == "pass", result.detail


def test_run_checks_reports_every_check_of_every_family_asked_for() -> None:
    seen = []
    results = run_checks("uniform", ["llava"], seen.append)
    assert results == seen and {r.check for r in results} == set(all_checks()) and {r.family for r in results} == {"llava"}


def test_a_broken_method_fails_conformance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: a cut that shifts every kept token by one is caught."""
    from vlmprune.core import cutting

    place = cutting._place

    def shifted(picture, parts):
        cut = place(picture, parts)
        if cut is not None and cut.rows is None:
            cut.keep = cut.keep.roll(1)
        return cut

    monkeypatch.setattr(cutting, "_place", shifted)
    failed = {r.check for r in run_checks("uniform@9", ["llava"]) if r.status == "fail"}
    assert "cut_equals_hand_built" in failed
