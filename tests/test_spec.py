# SPDX-License-Identifier: Apache-2.0
"""Spec and Budget: one line of text says what to run, and prints as it parses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest

from vlmprune.core.method import Method
from vlmprune.errors import SpecError
from vlmprune.registry import register, unregister
from vlmprune.spec import Budget, Part, Plan, Spec, parse


class Ranking(Method):
    layer: int = 2
    alpha: float = 1.0
    strict: bool = False
    variant: str = "paper"
    seed: int | None = None
    ratios: tuple[float, ...] = ()
    pair: tuple[int, str] = (0, "a")
    mode: Literal["a", "b", 3] = "a"
    free: object = None

    def score(self, tokens):
        return tokens


class Sparse(Method):
    ratio: float = 0.5  # a real option of this method, not a budget

    def score(self, tokens):
        return tokens


class Strict(Method):
    layer: int

    def score(self, tokens):
        return tokens


class Correct(Method):
    wraps = True

    inner: Method
    strength: float = 1.0

    def score(self, tokens):
        return self.inner.score(tokens)


class Everything(Method):
    budgeted = False

    def score(self, tokens):
        return tokens


class Inside(Method):
    slot = "inside_lm"


class Unresolved(Method):
    prior: Missing = None  # noqa: F821

    def score(self, tokens):
        return tokens


TOYS = {
    "ranking": Ranking,
    "sparse": Sparse,
    "strict": Strict,
    "correct": Correct,
    "everything": Everything,
    "inside": Inside,
    "unresolved": Unresolved,
}


@pytest.fixture(autouse=True, scope="module")
def toys() -> Iterator[None]:
    for name, cls in TOYS.items():
        register(name)(cls)
    yield
    for name in TOYS:
        unregister(name)


# reading and printing


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("ranking", "ranking"),
        ("ranking()", "ranking"),
        ("ranking()@64", "ranking@64"),
        (" ranking ( seed = 3 , layer = -1 ) @ .25 / total ", "ranking(layer=-1,seed=3)@0.25/total"),
        ("ranking(variant=official)@64/image", "ranking(variant=official)@64"),
        ("ranking(variant='official')", "ranking(variant=official)"),
        ("ranking(variant='a+b(c')@64", "ranking(variant='a+b(c')@64"),
        ('ranking(variant="it\'s")', 'ranking(variant="it\'s")'),
        (r"ranking(variant='\'+(')+inside", 'ranking(variant="\'+(")+inside'),
        ("ranking(variant='true')", "ranking(variant='true')"),
        ("ranking(variant='global')", "ranking(variant='global')"),
        ("ranking(strict=true,seed=none)", "ranking(seed=None,strict=True)"),
        ("ranking(ratios=[0.5, .25])", "ranking(ratios=(0.5,0.25))"),
        ("ranking(ratios=(1,))", "ranking(ratios=(1,))"),
        ("ranking(ratios=())", "ranking(ratios=())"),
        ("ranking(free=(1,(a,'b c'),none))", "ranking(free=(1,(a,'b c'),None))"),
        ("ranking(alpha=1e-3,layer=0x10)", "ranking(alpha=0.001,layer=16)"),
        ("correct ( strength=0.5 ) + inside(  ) @0.25", "correct(strength=0.5)+inside@0.25"),
        ("ranking@64+\neverything", "ranking@64+everything"),
    ],
)
def test_canonical_text(text: str, printed: str) -> None:
    spec = parse(text)
    assert str(spec) == printed
    assert parse(printed) == spec
    assert hash(parse(printed)) == hash(spec)
    assert parse(spec) is spec


def test_a_spec_is_its_parts() -> None:
    spec = parse("correct+ranking(layer=3,seed=1)@64/crop")
    part = Part("ranking", {"seed": 1, "layer": 3}, Budget(64, "crop"))
    assert spec.parts == (Part("correct"), part)
    assert part.args == (("layer", 3), ("seed", 1))
    assert spec == Spec([Part("correct"), part])


def test_parts_take_what_can_be_printed() -> None:
    part = Part("ranking", {"free": [np.int64(1), np.float64(0.5), (None, True)]})
    assert part.args == (("free", (1, 0.5, (None, True))),)
    assert Part("ranking", {"free": 1}) != Part("ranking", {"free": 1.0}) != Part("ranking", {"free": True})
    for value in (object(), {1: 2}, math.nan, math.inf, 2**64, b"x", 1j):
        with pytest.raises(SpecError, match="option 'free' got a"):
            Part("ranking", {"free": value})


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "+",
        "ranking+",
        "+ranking",
        "ranking++ranking",
        "@64",
        "(layer=1)",
        "ranking@",
        "ranking@64@32",
        "ranking@64(layer=1)",
        "ranking(",
        "ranking)",
        "ranking(layer=1",
        "ranking(layer=1))",
        "ranking(layer=1)(seed=2)",
        "ranking(layer=1)@(64)",
        "ranking(layer=1)seed",
        "ranking ranking",
        "ranking(layer)",
        "ranking(3)",
        "ranking(layer=)",
        "ranking(=3)",
        "ranking(layer==3)",
        "ranking(**x)",
        "ranking(*x)",
        "ranking(layer=1,layer=2)",
        "ranking(layer=1+1)",
        "ranking(layer=f(1))",
        "ranking(layer=--1)",
        "ranking(layer=+1)",
        "ranking(layer=-true)",
        "ranking(variant=a.b)",
        "ranking(variant=a-b)",
        "ranking(variant=f'a')",
        "ranking(free=b'a')",
        "ranking(free=...)",
        "ranking(free={})",
        "ranking(free=1j)",
        "ranking(free=(*a,))",
        "ranking(free=lambda:0)",
        "ranking(free=1e999)",
        "ranking(free=0x" + "f" * 5000 + ")",
        "ranking(free=" + "9" * 5000 + ")",
        "ranking(free=\0)",
        "ranking(free=" + "-" * 20000 + "1)",
        "ranking(free=" + "(" * 500 + ")" * 500 + ")",
        "ranking(variant='a)",
        "ranking(variant=\ud800)",
        "ranking(free=(yield))",
        "ranking(free=x:=3)",
        "ranking(free=a if b else c)",
    ],
)
def test_what_is_no_spec(text: str) -> None:
    with pytest.raises(SpecError):
        parse(text)


@pytest.mark.parametrize("thing", [None, 64, b"ranking", ["ranking"], Ranking, Ranking()])
def test_a_spec_is_text(thing: object) -> None:
    with pytest.raises(SpecError, match="a spec is text"):
        parse(thing)


def test_a_spec_has_a_method() -> None:
    with pytest.raises(SpecError, match="without methods"):
        Spec(())


# names and options are checked at once


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(SpecError, match="Did you mean 'fastervlm'"):
        parse("fastvervlm@64")
    with pytest.raises(
        SpecError, match=r"no option 'laier'; its options are \['layer', .*Did you mean 'layer'"
    ):
        parse("ranking(laier=3)")
    with pytest.raises(SpecError, match="no option 'layer'; its options are none"):
        parse("everything(layer=3)")
    with pytest.raises(SpecError, match="no option 'inner'"):
        parse("correct(inner=3)+ranking")


BUDGET_WORDS = """
ratio rate prune_rate prune_ratio reduction_ratio retain retain_ratio retention_ratio
retained_tokens keep_ratio drop drop_ratio sparsity budget tokens visual_token_num keep Ratio
"""


@pytest.mark.parametrize("word", BUDGET_WORDS.split())
def test_other_words_for_a_budget_are_refused_with_the_way_out(word: str) -> None:
    with pytest.raises(
        SpecError,
        match=r"ranking@64 \(tokens\) or ranking@0\.25 \(fraction\); a share to drop must be converted",
    ):
        parse(f"ranking({word}=128)")
    with pytest.raises(
        SpecError,
        match=r"0\.9 is the share to drop, write ranking@0\.1; if it is the share to keep, ranking@0\.9",
    ):
        parse(f"ranking({word}=0.9)")


def test_a_budget_word_that_is_a_real_option_is_one() -> None:
    assert parse("sparse(ratio=0.25)@64").build() == (Plan(Sparse(ratio=0.25), Budget(64)),)


@pytest.mark.parametrize(
    "args",
    [
        "layer=3",
        "alpha=3",
        "alpha=0.5",
        "strict=True",
        "variant=x",
        "seed=None",
        "seed=3",
        "ratios=(1,0.5)",
        "ratios=()",
        "pair=(1,b)",
        "mode=a",
        "mode=3",
        "free=3",
        "free=(a,(b,))",
    ],
)
def test_options_that_fit_their_annotation(args: str) -> None:
    key, value = parse(f"ranking({args})").parts[0].args[0]
    assert getattr(parse(f"ranking({args})").build()[0].method, key) == value


@pytest.mark.parametrize(
    "args",
    [
        "layer=x",
        "layer=0.5",
        "layer=True",
        "layer=None",
        "alpha=x",
        "alpha=True",
        "alpha=None",
        "strict=1",
        "strict=yes",
        "variant=3",
        "variant=None",
        "seed=x",
        "seed=True",
        "seed=0.5",
        "ratios=0.5",
        "ratios=(x,)",
        "ratios=abc",
        "pair=(1,)",
        "pair=(1,2)",
        "pair=(1,b,c)",
        "mode=c",
        "mode=3.0",
    ],
)
def test_options_that_do_not(args: str) -> None:
    key = args.partition("=")[0]
    with pytest.raises(SpecError, match=rf"option {key}=.* of method 'ranking' is a \w+; expected "):
        parse(f"ranking({args})")


def test_an_option_without_default_must_be_given() -> None:
    with pytest.raises(SpecError, match=r"no default for \['layer'\]; write strict\(layer=\.\.\.\)"):
        parse("strict@64")
    assert parse("strict(layer=3)").build() == (Plan(Strict(3)),)


def test_annotations_must_resolve() -> None:
    with pytest.raises(SpecError, match="Unresolved cannot be resolved"):
        parse("unresolved")


# building


def test_build_makes_one_plan_per_method_in_order() -> None:
    plans = parse("ranking(layer=3)@64/crop+everything+inside@0.25").build()
    assert plans == (
        Plan(Ranking(layer=3), Budget(64, "crop")),
        Plan(Everything()),
        Plan(Inside(), Budget(0.25)),
    )


def test_wrappers_take_the_method_to_their_right_with_its_budget() -> None:
    plans = parse("everything+correct+correct(strength=0.5)+ranking@64+inside").build()
    assert plans == (Plan(Everything()), Plan(Correct(Correct(Ranking(), 0.5)), Budget(64)), Plan(Inside()))


@pytest.mark.parametrize("text", ["correct", "ranking@64+correct", "correct@64+ranking", "correct+correct"])
def test_a_wrapper_needs_something_to_wrap_and_has_no_budget(text: str) -> None:
    with pytest.raises(
        SpecError,
        match=r"wraps the method to its right and has no budget of its own; .*correct\+fastervlm@64",
    ):
        parse(text)


def test_a_method_without_budget_refuses_one() -> None:
    with pytest.raises(SpecError, match="'everything' takes none; drop '@64'"):
        parse("everything@64")


def test_budgets_may_be_missing_until_they_are_required() -> None:
    with pytest.raises(
        SpecError,
        match=r"'ranking\(layer=3\)' has no budget; .*ranking\(layer=3\)@64 or ranking\(layer=3\)@0\.25",
    ):
        parse("correct+ranking(layer=3)").build(require_budget=True)
    assert len(parse("everything+inside+correct+ranking@64").build(require_budget=True)) == 3


def test_with_keep_sets_the_last_budget_and_leaves_the_scope() -> None:
    assert str(parse("ranking").with_keep(64)) == "ranking@64"
    assert (
        str(parse("correct+ranking@0.5/crop+everything").with_keep(0.25))
        == "correct+ranking@0.25/crop+everything"
    )
    assert str(parse("ranking@1/crop").with_keep("64/total")) == "ranking@64/total"
    assert str(parse("ranking@64+inside").with_keep(Budget(8))) == "ranking@64+inside@8"
    with pytest.raises(SpecError, match="no method takes a budget"):
        parse("everything").with_keep(64)
    with pytest.raises(SpecError, match="an int: @64"):
        parse("ranking").with_keep(64.0)


@pytest.mark.parametrize(
    ("text", "prunes"),
    [
        ("dense", False),
        ("var", False),
        ("pool@9", True),
        ("pool@1", True),
        ("pool@1.0", False),
        ("pool@1.0/crop", False),
        ("var+pool@0.5", True),
        ("pyramiddrop", True),
        ("debias+fastv@1.0", False),
        ("fastervlm@1.0+fastv@0.5", True),
    ],
)
def test_a_spec_says_whether_it_removes_tokens(text, prunes):
    assert parse(text).prunes is prunes
