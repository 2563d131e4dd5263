# SPDX-License-Identifier: Apache-2.0
"""Spec under random input: what is valid round-trips, what is not raises SpecError and nothing else."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.core.method import Method
from vlmprune.errors import SpecError
from vlmprune.registry import register, unregister
from vlmprune.spec import Budget, Part, Spec, parse


class Sample(Method):
    layer: int = 2
    alpha: float = 1.0
    strict: bool = False
    variant: str = "paper"
    seed: int | None = None
    ratios: tuple[float, ...] = ()
    free: object = None

    def score(self, tokens):
        return tokens


class Around(Method):
    slot = "inside_lm"
    wraps = True

    inner: Method
    strength: float = 1.0


class Late(Method):
    slot = "inside_lm"


class Unbudgeted(Method):
    slot = "attention"
    budgeted = False

    def reweight(self, attention, marked, visual):
        return attention


@pytest.fixture(autouse=True, scope="module")
def toys() -> Iterator[None]:
    classes = (Sample, Around, Late, Unbudgeted)
    for cls in classes:
        register(cls.__name__.lower())(cls)
    yield
    for cls in classes:
        unregister(cls.name)


keeps = st.integers(1, 2**63 - 1) | st.floats(0, 1, exclude_min=True)
budgets = st.none() | st.builds(Budget, keeps, st.sampled_from(["image", "crop", "total"]))
numbers = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
scalars = (
    st.none()
    | st.booleans()
    | numbers
    | st.text(max_size=8)
    | st.sampled_from(["true", "None", "official", "a+b", "(", "'\""])
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6)
sample_args = st.fixed_dictionaries(
    {},
    optional={
        "layer": st.integers(-99, 99),
        "alpha": numbers.filter(math.isfinite),
        "strict": st.booleans(),
        "variant": st.text(max_size=12),
        "seed": st.none() | st.integers(0, 9),
        "ratios": st.lists(st.floats(0, 1), max_size=3).map(tuple),
        "free": values,
    },
)
sample = st.builds(Part, st.just("sample"), sample_args, budgets)
parts = (
    sample
    | st.builds(Part, st.just("late"), st.just({}), budgets)
    | st.just(Part("unbudgeted"))
    | st.just(Part("around", {"strength": 0.5}))
)
specs = st.builds(lambda head, last: Spec((*head, last)), st.lists(parts, max_size=3), sample)


@settings(max_examples=300, deadline=None)
@given(specs)
def test_valid_specs_round_trip(spec: Spec) -> None:
    again = parse(str(spec))
    assert again == spec and str(again) == str(spec)
    assert again.parts == spec.parts
    assert again.build() == spec.build()


def never_silently_wrong(text: str) -> None:
    try:
        spec = parse(text)
    except SpecError as error:
        assert str(error)
    else:
        assert parse(str(spec)) == spec


@settings(max_examples=400, deadline=None)
@given(specs, st.data())
def test_mutated_specs_raise_or_round_trip(spec: Spec, data: st.DataObject) -> None:
    text = str(spec)
    for _ in range(data.draw(st.integers(1, 3))):
        at, cut = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, 3))
        text = (
            text[:at]
            + data.draw(st.text(string.printable, max_size=2) | st.sampled_from(list("+@/()='\"\\,.-")))
            + text[at + cut :]
        )
    never_silently_wrong(text)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=30)
    | st.text("sample+@/()=,'\"\\.0123456789e- \n#", max_size=30).map("sample(free={})@64".format)
)
def test_garbage_raises_or_round_trips(text: str) -> None:
    never_silently_wrong(text)
