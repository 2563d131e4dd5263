# SPDX-License-Identifier: Apache-2.0
"""Greedy coverage: the reference against a literal transcription, every other path against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.errors import InvariantError, SpecError, UnsupportedError
from vlmprune.kernels import dispatch

PLAIN = ("reference", "torch")


def picks_of(rows, k, weight=None, combine="product"):
    """Picks of one sample and what they were worth, row by row."""
    n, picks, worth = len(rows[0]), [], []
    while len(picks) < min(k, n):
        value = []
        for j in range(n):
            covered = [max([row[i] for i in picks] + [0.0]) for row in rows]
            gain = sum(max(0.0, row[j] - held) for row, held in zip(rows, covered, strict=True))
            if weight is not None:
                gain = gain * weight[j] if combine == "product" else gain + weight[j]
            value.append(gain)
        picks.append(max((j for j in range(n) if j not in picks), key=lambda j: (value[j], -j)))
        worth.append(value[picks[-1]])
    return picks, worth


@pytest.mark.parametrize("backend", PLAIN)
@given(st.data())
@settings(deadline=None, max_examples=150)
def test_picks_follow_the_definition_through_all_ties(backend, data):
    n, r = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 6))
    quarter = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0])  # exact in float32, and often equal
    rows = data.draw(st.lists(st.lists(quarter, min_size=n, max_size=n), min_size=r, max_size=r))
    weight = data.draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=n, max_size=n))
    combine, k = data.draw(st.sampled_from(dispatch.COMBINE)), data.draw(st.integers(0, n + 2))
    given_weight = None if weight is None else torch.tensor([weight])
    order, worth = dispatch.greedy_cover(torch.tensor([rows]), k, given_weight, combine, backend=backend)
    assert order.dtype == torch.int32 and worth.dtype == torch.float32
    expected, values = picks_of(rows, k, weight, combine)
    assert order[0].tolist() == expected
    assert worth[0].tolist() == pytest.approx(values)


@pytest.mark.parametrize("combine", dispatch.COMBINE)
def test_looking_again_only_at_leaders_makes_the_same_picks(combine):
    generator = torch.Generator().manual_seed(3)
    for n in (5, 64, 200):
        x = torch.nn.functional.normalize(torch.randn(3, n, 8, generator=generator), dim=-1)
        weight = torch.rand(3, n, generator=generator)
        lazy, value = dispatch.greedy_cover(x @ x.mT, n // 3 + 1, weight, combine, backend="torch")
        full, expected = dispatch.greedy_cover(x @ x.mT, n // 3 + 1, weight, combine, backend="reference")
        assert torch.equal(lazy, full)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", PLAIN)
def test_tokens_without_a_number_come_last_and_barred_ones_before_them(backend):
    rows = torch.rand(2, 4, 9, generator=torch.Generator().manual_seed(4))
    rows[0, 2, 3] = math.nan
    weight = torch.zeros(2, 9)
    weight[:, 5] = -torch.inf
    order, worth = dispatch.greedy_cover(rows, 9, weight, "sum", backend=backend)
    assert order[0, -2:].tolist() == [5, 3] and worth[0, -1].isnan() and order[1, -1] == 5
    assert [sorted(row) for row in order.tolist()] == [list(range(9))] * 2


@pytest.mark.parametrize("backend", PLAIN)
def test_longer_walks_begin_as_shorter_ones_and_rows_are_alone(backend):
    rows = torch.rand(2, 30, 40, generator=torch.Generator().manual_seed(5))
    long = dispatch.greedy_cover(rows, 40, backend=backend)[0]
    assert torch.equal(dispatch.greedy_cover(rows, 7, backend=backend)[0], long[:, :7])
    assert torch.equal(dispatch.greedy_cover(rows[1:], 40, backend=backend)[0][0], long[1])


@pytest.mark.parametrize("backend", PLAIN)
def test_nothing_to_cover_and_nothing_to_pick(backend):
    order, worth = dispatch.greedy_cover(torch.zeros(2, 0, 3), 2, backend=backend)
    assert order.tolist() == [[0, 1]] * 2 and worth.tolist() == [[0.0, 0.0]] * 2
    assert dispatch.greedy_cover(torch.zeros(2, 4, 3), 0, backend=backend)[0].shape == (2, 0)
    assert dispatch.greedy_cover(torch.zeros(2, 4, 0), 3, backend=backend)[1].shape == (2, 0)


def test_bad_input_is_refused_by_name():
    rows = torch.rand(1, 4, 5)
    with pytest.raises(InvariantError, match=r"rows is .*\(4, 5\)"):
        dispatch.greedy_cover(rows[0], 2)
    with pytest.raises(InvariantError, match=r"weight is .* expected a shape of"):
        dispatch.greedy_cover(rows, 2, torch.ones(1, 4))
    with pytest.raises(InvariantError, match=r"weight holds -0\.5; expected numbers from 0 on"):
        dispatch.greedy_cover(rows, 2, torch.tensor([[1.0, -0.5, 1, 1, 1]]))
    with pytest.raises(SpecError, match="combine='times'"):
        dispatch.greedy_cover(rows, 2, torch.ones(1, 5), "times")
    with pytest.raises(UnsupportedError, match="no Triton kernel"):
        dispatch.greedy_cover(rows, 2, backend="triton")
