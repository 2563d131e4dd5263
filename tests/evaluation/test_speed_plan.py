# SPDX-License-Identifier: Apache-2.0
"""The plan: what its fit finds, and where it advises to prune."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from vlmprune.errors import SpecError
from vlmprune.speed.card import Effort
from vlmprune.speed.plan import (
    LIMITS,
    Case,
    Costs,
    decode_terms,
    fit,
    pays,
    plan,
    prefill_terms,
    verdict,
)
from vlmprune.speed.workload import make_workload


def test_the_fit_finds_the_costs_that_made_the_points():
    points = [(b, n) for b in (1, 2) for n in (100, 300, 600)]
    terms = [prefill_terms(b, [n]) for b, n in points]
    truth = (0.01, 2e-4, 3e-7)
    found, error = fit(terms, [float(np.dot(truth, row)) for row in terms])
    assert found == pytest.approx(truth) and error < 1e-9


def test_no_cost_is_negative():
    terms = [decode_terms(1, [n]) for n in (100, 200, 300)]
    found, error = fit(terms, [0.30, 0.20, 0.10])  # falls with n: nothing the model can say
    assert min(found) >= 0 and error > 0.2


def costs(**changes):
    """Linear in tokens: a layer costs 1 ms per token of prefill, a step 10 ms, the tower nothing."""
    base = {
        "prefill": (0.0, 1e-3, 0.0),
        "decode": (0.01, 0.0, 0.0),
        "encode": 0.0,
        "choose": 0.0,
        "loop": 0.0,
        "visual_tokens": 500,
        "shares": (0.1,),
    }
    return Costs(**base | changes)


CASE = Case(visual_tokens=500, text_tokens=100, batch=1, answer_tokens=11)


def test_totals_are_the_stated_sum():
    assert costs().total(CASE, False) == pytest.approx(0.6 + 10 * 0.01)
    assert costs().total(CASE, True) == pytest.approx(0.15 + 10 * 0.01)
    dear = costs(encode=0.2, choose=0.05, loop=0.001)
    assert dear.total(replace(CASE, batch=2), True) == pytest.approx(2 * 0.25 + 0.3 + 10 * 0.011)
    assert costs(shares=(1.0, 0.0)).total(CASE, True) == pytest.approx(
        (0.6 + 0.1) / 2 + 0.1
    )  # a cut half-way through the layers


def test_advice_follows_the_gain():
    assert verdict(costs(), CASE, 0.05) == {
        "advice": "prune",
        "gain": pytest.approx(0.45 / 0.7),
        "dense_s": pytest.approx(0.7),
        "pruned_s": pytest.approx(0.25),
    }
    assert (
        verdict(costs(choose=0.5), CASE, 0.05)["advice"] == "do not prune"
    )  # choosing costs more than it saves
    assert verdict(costs(), CASE, 0.7)["advice"] == "do not prune"


def test_ranges_end_where_pruning_stops_to_pay():
    found = pays(costs(), CASE, "answer_tokens", 0.05)
    last = max(a for a in range(1, 4097) if 0.45 / (0.6 + (a - 1) * 0.01) > 0.05)
    assert found == {"from": 1, "to": last, "limit": LIMITS["answer_tokens"]}
    least = pays(costs(choose=0.09), CASE, "visual_tokens", 0.05)
    assert least["from"] > 100 and least["to"] == LIMITS["visual_tokens"]
    assert pays(costs(choose=99.0), CASE, "batch", 0.05) is None


def test_more_of_the_method_never_looks_better():
    gains = [costs(choose=choose).gain(CASE) for choose in (0.0, 0.1, 0.2)]
    assert gains == sorted(gains, reverse=True)


@pytest.mark.parametrize("spec", ["fastervlm@144", "pool@144", "fastv(layer=2)@144"])
def test_there_is_no_plan_for_a_budget_of_all_tokens(spec, monkeypatch):
    monkeypatch.setattr("vlmprune.speed.plan.race", None)  # nothing is timed
    with pytest.raises(SpecError, match=r"cuts nothing of tiny, whose pictures have \[144\] visual tokens"):
        plan(make_workload("tiny"), spec)


def test_a_plan_is_whole_and_says_what_it_rests_on():
    found = plan(make_workload("tiny"), "fastervlm@9", answer_tokens=4, worth=1.0, effort=Effort(1, 1, 0))
    assert found["advice"] == "do not prune"  # nothing saves all of the time
    assert found["case"] == {"visual_tokens": 144, "text_tokens": 9, "batch": 1, "answer_tokens": 4}
    assert len(found["measured"]) == 6 and found["costs"]["shares"] == (0.0625,) * 8
    assert found["ranges"] == dict.fromkeys(LIMITS)
    assert found["threshold"] >= 1.0 and found["check"]["error"] >= 0
    json.dumps(found)
