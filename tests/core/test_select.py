# SPDX-License-Identifier: Apache-2.0
"""Selection: ties, order, and every way in which a method's answer is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.core.method import Merged, Method
from vlmprune.core.select import choose, rest_of, top_k, top_k_in_groups
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import InvariantError

few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan])


def reference_top_k(row, k):
    order = sorted(
        range(len(row)), key=lambda i: (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i)
    )
    return sorted(order[:k])


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_top_k_is_a_stable_sort(data):
    n = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.lists(few_values, min_size=n, max_size=n), min_size=1, max_size=3))
    k = data.draw(st.integers(1, n))
    keep = top_k(torch.tensor(rows), k)
    assert keep.dtype == torch.int64
    assert keep.tolist() == [reference_top_k(row, k) for row in rows]
    assert rest_of(keep, n).tolist() == [[i for i in range(n) if i not in row] for row in keep.tolist()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_top_k_takes_any_dtype(dtype):
    assert top_k(torch.tensor([[1, 3, 2, 3]]).to(dtype), 3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(("scores", "k"), [(torch.ones(1, 4), 5), (torch.ones(1, 4), 0), (torch.ones(4), 1)])
def test_top_k_refuses_impossible_budgets(scores, k):
    with pytest.raises(InvariantError, match="top"):
        top_k(scores, k)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_groups_give_their_best_in_order(data):
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    n, start, groups = sum(sizes), 0, []
    order = data.draw(st.permutations(range(n)))
    for size in sizes:
        groups.append(order[start : start + size])
        start += size
    row = data.draw(st.lists(st.integers(-2, 2), min_size=n, max_size=n))
    quota = data.draw(st.lists(st.integers(0, 6), min_size=len(sizes), max_size=len(sizes)))
    k = data.draw(st.integers(1, n))
    expected = []
    for group, most in zip(groups, quota, strict=True):
        expected += group if most >= len(group) else sorted(group, key=lambda i: -row[i])[:most]
    members = torch.tensor([group + [-1] * (max(sizes) - len(group)) for group in groups])
    scores = torch.tensor([row]).float()[:, members]
    assert top_k_in_groups(scores, members, torch.tensor([quota]), k).tolist() == [(expected + [-1] * n)[:k]]


@dataclass(frozen=True)
class Scores(Method):
    answer: object = None

    def score(self, tokens):
        return self.answer


@dataclass(frozen=True)
class Selects(Method):
    answer: object = None

    def select(self, tokens, k):
        return self.answer


@dataclass(frozen=True)
class Merges(Method):
    answer: object = None

    def merge(self, tokens, k):
        return self.answer


TOKENS = VisualTokens(features=torch.arange(16.0).view(2, 4, 2))


def test_scores_keep_the_highest():
    assert choose(Scores(torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1]])), TOKENS, 2).tolist() == [
        [2, 3],
        [0, 1],
    ]


def test_selected_sets_are_put_in_order():
    assert choose(Selects(torch.tensor([[3, 0], [1, 2]])), TOKENS, 2).tolist() == [[0, 3], [1, 2]]


def test_merged_rows_keep_their_own_order():
    merged = Merged(torch.ones(2, 3, 2), torch.tensor([[-1, 3, 0], [-1, -1, 2]]))
    assert choose(Merges(merged), TOKENS, 3) is merged


@pytest.mark.parametrize("method", [Scores(), Selects()])
def test_keeping_all_asks_no_method(method):
    assert choose(method, TOKENS, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_keeping_all_of_a_merging_method_is_dense():
    merged = choose(Merges(), TOKENS, 4)
    assert merged.features is TOKENS.features
    assert merged.slots.tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("k", [0, -1, 5])
def test_budgets_outside_the_unit_are_refused(k):
    with pytest.raises(InvariantError, match="clamp"):
        choose(Scores(torch.ones(2, 4)), TOKENS, k)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Scores(torch.tensor([[1.0, math.nan, 2, 3], [math.inf, 1, 2, 3]])), "2 of 8 scores are not finite"),
        (Scores(torch.ones(2, 5)), r"float32 of shape \(2, 5\).*\(2, 4\)"),
        (Scores([1, 2]), "a list"),
        (Selects(torch.tensor([[0, 1, 2], [0, 1, 2]])), r"int64 of shape \(2, 3\).*\(2, 2\)"),
        (Selects(torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)), "int32"),
        (Selects(torch.tensor([[0, 4], [0, 1]])), r"out of range \[4\]"),
        (Selects(torch.tensor([[0, -1], [0, 1]])), r"out of range \[-1\]"),
        (Selects(torch.tensor([[0, 1], [3, 3]])), r"repeated \[3\]"),
        (Selects(None), "a NoneType"),
        (Merges(torch.ones(2, 2, 2)), "expected a Merged"),
        (Merges(Merged(torch.ones(2, 3, 2), torch.zeros(2, 2, dtype=torch.int64))), "features"),
        (Merges(Merged(torch.ones(2, 2, 3), torch.tensor([[0, 1]] * 2))), "features"),
        (Merges(Merged(torch.ones(2, 2, 2).half(), torch.tensor([[0, 1]] * 2))), "float16"),
        (Merges(Merged(torch.ones(2, 2, 2), torch.tensor([[0.0, 1]] * 2))), "slots"),
        (Merges(Merged(torch.ones(2, 2, 2), torch.tensor([[0, 1], [2, 2]]))), r"repeated \[2\]"),
        (Merges(Merged(torch.ones(2, 2, 2), torch.tensor([[0, 1], [-2, 4]]))), r"out of range \[-2, 4\]"),
        (Merges(Merged(torch.full((2, 2, 2), math.nan), torch.tensor([[0, 1]] * 2))), "not finite"),
    ],
)
def test_wrong_answers_are_refused(method, message):
    with pytest.raises(InvariantError, match=message):
        choose(method, TOKENS, 2)
