# SPDX-License-Identifier: Apache-2.0
"""Bad specs and budgets: the error shows what was given and the nearest name, and the model stays as it was.

Hypothesis draws faults and where they are put; every category counts how many different bad inputs it saw
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import vlmprune
from vlmprune import VlmPruneError
from vlmprune.core.budget import SCOPES
from vlmprune.registry import get
from vlmprune.spec import Budget, Part, Spec
from vlmprune.testing.checks_model import snapshot
from vlmprune.testing.tiny import tiny_inputs, tiny_model

METHODS = vlmprune.list_methods()
BUDGETED = ("random", "uniform", "pool", "fastervlm", "visionzip", "divprune")
OPTIONS = [(name, option.name) for name in BUDGETED for option in vlmprune.method_info(name).options]
DROP_WORDS = (
    "ratio",
    "rate",
    "drop",
    "prune_rate",
    "prune_ratio",
    "retain",
    "sparsity",
    "reduction_ratio",
    "visual_token_num",
)
KEEP = ("int >= 1", "float in (0, 1]")  # what every error about a budget must say


class Bad(NamedTuple):
    """One bad input: how to give it, what the message must show, the name it must propose, who refuses it, on
    which model.
    """

    what: str
    give: Callable[[], Any]
    shows: Sequence[str]
    near: str = ""
    error: type[Exception] | tuple[type[Exception], ...] = VlmPruneError
    family: str = "llava"


@cache
def model(family: str = "llava") -> Any:
    found = tiny_model(family)
    answer(found, family)  # transformers leaves hooks of its own at the first call
    return found


@cache
def inputs(family: str = "llava") -> dict[str, torch.Tensor]:
    return tiny_inputs(family)


@torch.no_grad()
def answer(found: Any, family: str = "llava") -> list[int]:
    return found.generate(**inputs(family), max_new_tokens=3)[0].tolist()


def refused(strategy: st.SearchStrategy[Bad], examples: int) -> set[str]:
    """Draw that many inputs, require each to be refused and to change nothing, and return the different
    ones."""
    tried: set[str] = set()

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def refuse(bad: Bad) -> None:
        before = snapshot(model(bad.family))
        with pytest.raises(bad.error) as caught:
            passed = bad.give()
            getattr(passed, "detach", lambda: None)()
            pytest.fail(f"passed silently: {bad.what}")
        message = str(caught.value)
        wanted = [*bad.shows, *([f"Did you mean {bad.near!r}?"] if bad.near else [])]
        absent = [text for text in wanted if text not in message]
        assert message and not absent, f"{bad.what}: {message!r} does not show {absent}"
        assert snapshot(model(bad.family)) == before, f"{bad.what}: the model has changed"
        tried.add(bad.what)

    refuse()
    return tried


@st.composite
def misspelt(draw: st.DrawFn, words: Sequence[str]) -> tuple[str, str]:
    """(wrong, right): one letter dropped, doubled, or swapped with the next."""
    right = draw(st.sampled_from(words))
    i = draw(st.integers(0, len(right) - 2))
    a, b = right[i : i + 2]
    wrong = right[:i] + draw(st.sampled_from([b, a + b + b, b + a])) + right[i + 2 :]
    assume(wrong not in words)
    return wrong, right


# --- specs: strategies of (spec, what the message shows, nearest name) ----------------------------

bad_numbers = st.one_of(
    st.integers(-(2**63), 0),
    st.floats(max_value=0),
    st.floats(1, exclude_min=True),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
not_numbers = st.from_regex(
    r"[0-9]{0,3}[a-df-z%_,;:!][0-9a-z%]{0,3}", fullmatch=True
)  # no e, which is an exponent
bad_keep_text = st.one_of(bad_numbers.map(repr), not_numbers, st.just(""))
not_text = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(),
    st.just(METHODS),
    st.just({"random": 4}),
)
WRONG_VALUES = {
    "random(seed={})@4": ["1.5", "true", "none", "'1'", "(1,2)", "-1", "4294967296", "word"],
    "fastervlm(layer={})@4": ["1.5", "true", "deep", "(1,)", "'-2'", "1e999"],
    "fastervlm(cls={})@4": ["1", "true", "none", "(token,)"],
    "visionzip(contextual={})@4": ["-1", "1.5", "true", "some", "()"],
}
WRONG_WORDS = {"fastervlm(cls={})@4": ["token", "mean"], "visionzip(anyres={})@4": ["spatial", "unpad"]}
BROKEN = [
    "",
    " ",
    "+",
    "random@4+",
    "+random@4",
    "random@4@4",
    "random@@4",
    "@4",
    "(seed=1)@4",
    "random(3)@4",
    "random(seed)@4",
    "random(seed=)@4",
    "random(seed=1,seed=2)@4",
    "random(*a)@4",
    "random(**a)@4",
    "random(seed=f())@4",
    "random(seed={})@4",
    "random(seed=1;2)@4",
    "random(seed=1+1)@4",
    "random(seed=1)x@4",
    "random(seed=1 2)@4",
    "random(seed=a.b)@4",
    "pool@4 dense",
    "random(seed=1)(seed=2)@4",
    "random@4(seed=1)",
    "random@4/crop/crop",
    "dense@4",
    "random@4+pool@4",
    "random",
    "pool+uniform",
]

SPEC_FAULTS: dict[str, st.SearchStrategy[tuple[Any, Sequence[str], str]]] = {
    "name": misspelt(METHODS).map(lambda p: (f"{p[0]}@64", (repr(p[0]), "list_methods"), p[1])),
    "case": st.sampled_from(BUDGETED).map(lambda name: (f"{name.upper()}@64", (name.upper(),), name)),
    "budget": st.tuples(st.sampled_from(BUDGETED), bad_keep_text).map(
        lambda p: (
            "@".join(p),
            (p[1].split("+")[0], *KEEP),
            "",
        )  # 1e+16 is read up to the '+', which joins methods
    ),
    "scope": misspelt(SCOPES).map(lambda p: (f"random@8/{p[0]}", (repr(p[0]), *SCOPES), p[1])),
    "option": st.sampled_from(OPTIONS).flatmap(
        lambda o: misspelt([o[1]]).map(lambda p: (f"{o[0]}({p[0]}=1)@64", (repr(o[0]), repr(p[0])), p[1]))
    ),
    "drop": st.tuples(
        st.sampled_from(BUDGETED), st.sampled_from(DROP_WORDS), st.integers(1, 99).map(lambda i: i / 100)
    ).map(
        lambda p: (
            f"{p[0]}({p[1]}={p[2]})",
            (f"{p[1]}={p[2]}", "KEEP", f"{p[0]}@{round(1 - p[2], 12)}", f"{p[0]}@{p[2]}"),
            "",
        )
    ),
    "value": st.sampled_from(
        [(frame, value) for frame, values in WRONG_VALUES.items() for value in values]
    ).map(lambda p: (p[0].format(p[1]), (p[0].split("(")[1].split("=")[0],), "")),
    "word": st.sampled_from(list(WRONG_WORDS.items())).flatmap(
        lambda f: misspelt(f[1]).map(lambda p: (f[0].format(p[0]), (repr(p[0]), *f[1]), p[1]))
    ),
    "broken": st.sampled_from(BROKEN).map(lambda text: (text, (), "")),
    "parentheses": st.lists(st.integers(0, 9), min_size=2, max_size=2, unique=True).map(
        lambda n: (f"random{'(' * n[0]}{')' * n[1]}@64", ("unbalanced parentheses", "random"), "")
    ),
    "type": not_text.map(lambda given: (given, (type(given).__name__, repr(given)), "")),
}
VERBS: dict[str, Callable[[Any], Any]] = {
    "prune": lambda spec: vlmprune.prune(model(), spec),
    "attach": lambda spec: vlmprune.attach(model(), spec),
    "select": lambda spec: vlmprune.select(spec, features=torch.rand(1, 36, 8), grid=(6, 6)),
    "parse": vlmprune.parse,
    "score": lambda spec: vlmprune.score(model(), inputs(), spec),
}


@st.composite
def bad_specs(draw: st.DrawFn) -> Bad:
    fault = draw(st.sampled_from(list(SPEC_FAULTS)))
    spec, shows, near = draw(SPEC_FAULTS[fault])
    verb = draw(
        st.sampled_from(list(VERBS)[: 3 if fault == "broken" else 5])
    )  # a spec may lack what only pruning needs
    return Bad(f"{verb}({spec!r})", lambda: VERBS[verb](spec), shows, near)


# --- keep -----------------------------------------------------------------------------------------

KEEP_PLACES: dict[str, Callable[[Any], Any]] = {
    "Budget": Budget,
    "Part": lambda keep: Part("random", {}, Budget.of(keep)),
    "with_keep": lambda keep: vlmprune.parse("random").with_keep(keep),
    "prune": lambda keep: vlmprune.prune(model(), "random", keep=keep),
    "prune an object": lambda keep: vlmprune.prune(model(), get("fastervlm")(), keep=keep),
    "attach": lambda keep: vlmprune.attach(model(), "uniform", keep=keep),
    "select": lambda keep: vlmprune.select("random", keep=keep, features=torch.rand(1, 36, 8)),
    "ScoreMap.keep": lambda keep: vlmprune.ScoreMap(torch.rand(36), ((6, 6),)).keep(keep),
}
half = st.integers(-100, 0) | st.floats(-8, 0, width=16) | st.floats(1, 8, exclude_min=True, width=16)
bad_keeps = st.one_of(
    bad_numbers,
    st.integers(2**63) | st.integers(max_value=-(2**63) - 1) | st.just(10**5000),
    half.flatmap(
        lambda x: st.sampled_from([np.float16(x), np.float32(x), np.float64(x), np.array(x), torch.tensor(x)])
    ),
    st.integers(-100, 0).flatmap(
        lambda x: st.sampled_from([np.int8(x), np.int64(x), Decimal(x), Fraction(x)])
    ),
    st.fractions(1).filter(lambda x: x > 1),
    st.sampled_from(
        [
            True,
            False,
            np.True_,
            np.array(4),
            np.array([4, 5]),
            torch.tensor(4),
            torch.tensor([0.5]),
            Decimal("0.5"),
        ]
    ),
    st.sampled_from([4j, b"64", [64], (64,), {64}, {"keep": 64}, int, object, ..., range(4), slice(4)]),
    st.sampled_from([Fraction(10**400)]),
)


@st.composite
def bad_keep_values(draw: st.DrawFn) -> Bad:
    place = draw(st.sampled_from(list(KEEP_PLACES)))
    keep = draw(
        bad_keeps if place == "Budget" else bad_keeps | bad_keep_text
    )  # Budget.of reads text, Budget takes numbers
    given = (
        keep
        if isinstance(keep, str)
        else "64 bits"
        if isinstance(keep, int) and abs(keep) >= 2**63
        else repr(keep)
    )
    return Bad(f"{place}: {type(keep).__name__} {given}", lambda: KEEP_PLACES[place](keep), (given, *KEEP))


# category: (drawn inputs, how many to draw, how many different ones must have been refused)
CATEGORIES = {"specs": (bad_specs(), 220, 150), "keep": (bad_keep_values(), 160, 100)}


def test_the_categories_try_at_least_200_inputs():
    assert sum(different for _, _, different in CATEGORIES.values()) >= 200


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_bad_input_is_refused_and_changes_nothing(category):
    strategy, examples, different = CATEGORIES[category]
    before = answer(model())
    assert len(refused(strategy, examples)) >= different
    assert answer(model()) == before


def test_a_missing_budget_is_asked_for():
    for name in BUDGETED:
        for give in (vlmprune.prune, vlmprune.attach):
            with pytest.raises(VlmPruneError, match=f"{name}@64"):
                give(model(), name, keep=None)
            with pytest.raises(VlmPruneError, match=f"{name} needs a budget: give keep=64"):
                give(model(), get(name)(), keep=None)


HANDMADE: list[tuple[Callable[[], Any], str]] = [
    (lambda: Budget(4, "tile"), "'tile'.*'image', 'crop', 'total'"),
    (lambda: Budget(4, None), "None.*'image', 'crop', 'total'"),
    (lambda: Part("random", (("seed", 1), ("seed", 2))), "'random'.*twice.*'seed'"),
    (lambda: Part("random", {"seed": object()}), "'seed'.*object"),
    (lambda: Part("random", {"seed": np.nan}), "'seed'.*finite"),
    (lambda: Part("random", {"sed": 1}).build(), "'sed'.*Did you mean 'seed'"),
    (lambda: Part(3).build(), "method 3 is unknown"),
    (lambda: Spec(()), "without methods"),
    (lambda: get("fastervlm")(cls="tokn"), "'tokn'.*Did you mean 'token'"),
    (lambda: get("fastervlm")(layer=True), "layer=True"),
    (lambda: get("random")(seed=1.5), r"seed=1\.5"),
    (lambda: vlmprune.method_info("fastervlmm"), "'fastervlmm'.*Did you mean 'fastervlm'"),
    (lambda: vlmprune.method_info(None), "None is unknown.*list_methods"),
    (lambda: Part("random", 3), "args=3 of method 'random'.*mapping"),
    (lambda: Part("random", {3: 4}), "args={3: 4} of method 'random'.*names"),
    (lambda: Part("random", {}, 1.5), r"keep=1\.5"),
    (lambda: Spec("random@4"), r"'random@4'.*parse\("),
    (lambda: Spec(3), "parts=3.*Part"),
]


@pytest.mark.parametrize(("give", "message"), HANDMADE, ids=[message for _, message in HANDMADE])
def test_what_is_built_by_hand_is_checked_as_text_is(give, message):
    with pytest.raises(VlmPruneError, match=message):
        give()


def test_attaching_twice_is_refused_and_the_first_goes_on():
    before, dense = snapshot(model()), answer(model())
    handle = vlmprune.attach(model(), "fastervlm@4")
    attached, pruned = snapshot(model()), answer(model())
    for again in ("fastervlm@4", "uniform@2"):
        with pytest.raises(VlmPruneError, match="'fastervlm@4' attached already; detach it first"):
            vlmprune.attach(model(), again)
        assert snapshot(model()) == attached
    assert answer(model()) == pruned and handle.last.realised_tokens == [4]
    handle.detach()
    assert snapshot(model()) == before and answer(model()) == dense


def test_detaching_twice_is_harmless():
    before = snapshot(model())
    with vlmprune.prune(model(), "fastervlm@4") as run:
        run.detach()
        run.detach()
    assert snapshot(model()) == before
    handle = vlmprune.attach(model(), "uniform@5")
    run.detach()  # a session that is over leaves the next one alone
    answer(model())
    assert handle.last.realised_tokens == [5]
    handle.detach()
    assert snapshot(model()) == before


@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_exception_inside_generate_comes_out_and_leaves_nothing(step):
    """Raised after the prompt or at a later step: the session works on, and the model is clean once it is
    over.
    """
    before, dense = snapshot(model()), answer(model())

    def explode(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == inputs()["input_ids"].shape[1] + step:
            raise KeyboardInterrupt("stop")
        return scores

    with vlmprune.prune(model(), "fastervlm@4") as run:
        pruned = answer(model())
        with pytest.raises(KeyboardInterrupt, match="stop"):
            model().generate(**inputs(), max_new_tokens=5, logits_processor=[explode])
        assert answer(model()) == pruned and run.last.realised_tokens == [4]
    with pytest.raises(KeyboardInterrupt, match="stop"), vlmprune.prune(model(), "fastervlm@4"):
        model().generate(**inputs(), max_new_tokens=5, logits_processor=[explode])
    assert snapshot(model()) == before and answer(model()) == dense
