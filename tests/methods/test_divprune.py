# SPDX-License-Identifier: Apache-2.0
"""DivPrune against a literal transcription of farthest-point greedy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import InvariantError
from vlmprune.methods.divprune import DivPrune, greedy_maxmin


def features(batch=2, n=40, width=8, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(batch, n, width)).astype(np.float32))


def transcription(x, k):
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    d = 1 - x @ x.T
    first = np.sort(d, axis=0)[1]  # second smallest of each column; the smallest is the token itself
    picks, distance = [int(first.argmax())], [first.max()]
    while len(picks) < k:
        nearest = d[picks].min(axis=0)
        nearest[picks] = -np.inf
        picks.append(int(nearest.argmax()))
        distance.append(nearest.max())
    return picks, distance


@pytest.mark.parametrize("k", [1, 7, 40])
def test_picks_and_distances_follow_the_definition(k):
    x = features()
    order, distance = greedy_maxmin(x, k)
    for row in range(2):
        picks, expected = transcription(x[row].double().numpy(), k)
        assert order[row].tolist() == picks
        np.testing.assert_allclose(distance[row].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_far_tokens_win_over_a_cluster():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.01], [1.0, 0.02], [-1.0, 0.0], [0.0, 1.0]]])
    keep = choose(DivPrune(), VisualTokens(features=x), 3)[0].tolist()
    assert {3, 4} <= set(keep)


def test_length_does_not_matter():
    x = features()
    scaled = x * torch.linspace(0.5, 8, x.shape[1])[:, None]
    assert torch.equal(greedy_maxmin(x, 9)[0], greedy_maxmin(scaled, 9)[0])


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 999))
@settings(deadline=None, max_examples=60)
def test_coinciding_tokens_are_never_picked_twice(distinct, copies, seed):
    x = features(1, distinct, 4, seed).repeat(1, copies, 1)
    n = distinct * copies
    order, _ = greedy_maxmin(x, n)
    assert sorted(order[0].tolist()) == list(range(n))
    # copies are far from nothing, so they come last
    assert len({i % distinct for i in order[0, :distinct].tolist()}) == distinct


def test_walks_are_nested_and_rows_independent():
    x = features()
    long = greedy_maxmin(x, 30)[0]
    assert DivPrune.nested
    assert torch.equal(greedy_maxmin(x, 9)[0], long[:, :9])
    assert torch.equal(greedy_maxmin(x[1:], 30)[0][0], long[1])


def test_zero_vectors_count_as_far_from_all():
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 0.1], [0.0, 0.0]]])
    order, distance = greedy_maxmin(x, 4)
    assert torch.isfinite(distance).all()
    assert sorted(order[0].tolist()) == [0, 1, 2, 3]


def test_half_precision_features_are_compared_in_float32():
    x = features().bfloat16()
    assert torch.equal(greedy_maxmin(x, 20)[0], greedy_maxmin(x.float(), 20)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(value):
    x = features(1, 6)
    x[0, 2, 0] = value
    with pytest.raises(InvariantError, match="not finite"):
        choose(DivPrune(), VisualTokens(features=x), 3)


def test_single_tokens_and_impossible_budgets():
    assert greedy_maxmin(features(3, 1), 1)[0].tolist() == [[0]] * 3
    with pytest.raises(InvariantError, match="cannot pick 5"):
        greedy_maxmin(features(1, 4), 5)
