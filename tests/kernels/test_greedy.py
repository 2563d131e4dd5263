# SPDX-License-Identifier: Apache-2.0
"""Greedy choices: the reference against literal transcriptions, every other path against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels import cpu_greedy, dispatch, eager
from vlmprune.kernels.backends import BACKENDS

PLAIN = [name for name in BACKENDS if name != "triton"]
FIRST = ("nn", "argmax")


def unit_rows(batch=2, n=40, width=8, seed=0):
    x = torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(x, dim=-1)


def maxmin(sim, k, weight, first):
    """Picks of one sample, token by token."""
    n, picks = len(sim), []
    while len(picks) < k:
        value = []
        for i in range(n):
            others = picks or ([j for j in range(n) if j != i] if first == "nn" else [])
            nearest = max((sim[i][j] if not picks else sim[j][i] for j in others), default=0.0)
            value.append(weight[i] * (1 - nearest))
        picks.append(max((i for i in range(n) if i not in picks), key=lambda i: (value[i], -i)))
    return picks


def determinant(kernel, picks):
    return np.linalg.det(kernel[np.ix_(picks, picks)])


# --- max-min --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", PLAIN)
@given(st.data())
@settings(deadline=None, max_examples=100)
def test_picks_follow_the_definition_through_all_ties(backend, data):
    n = data.draw(st.integers(1, 8))
    quarter = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0])  # exact in float32, and often equal
    sim = data.draw(st.lists(st.lists(quarter, min_size=n, max_size=n), min_size=n, max_size=n))
    weight = data.draw(st.none() | st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=n, max_size=n))
    first, k = data.draw(st.sampled_from(FIRST)), data.draw(st.integers(0, n + 2))
    given_weight = None if weight is None else torch.tensor([weight])
    order, worth = dispatch.greedy_maxmin(torch.tensor([sim]), k, given_weight, first, backend=backend)
    assert order.dtype == torch.int32 and worth.dtype == torch.float32
    assert order[0].tolist() == maxmin(sim, min(k, n), weight or [1.0] * n, first)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_have_their_place(first, weighted, special):
    generator = torch.Generator().manual_seed(1)
    for seed in range(20):
        sim = unit_rows(2, 12, seed=seed) @ unit_rows(2, 12, seed=seed).mT
        sim[
            0,
            torch.randint(0, 12, (2,), generator=generator),
            torch.randint(0, 12, (2,), generator=generator),
        ] = special
        weight = torch.rand(2, 12, generator=generator) if weighted else None
        if weighted:
            weight[1, seed % 12] = special
        expected = dispatch.greedy_maxmin(sim, 12, weight, first, backend="reference")
        found = dispatch.greedy_maxmin(sim, 12, weight, first, backend="torch")
        assert torch.equal(found[0], expected[0]), seed
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0, equal_nan=True)
        assert [sorted(row) for row in found[0].tolist()] == [list(range(12))] * 2


def test_a_token_without_a_number_is_the_last_pick():
    features = unit_rows(1, 9)
    features[0, 4] = math.nan
    for backend in PLAIN:
        order, worth = dispatch.greedy_maxmin_features(
            features, 9, torch.ones(1, 9), "argmax", backend=backend
        )
        assert order[0, -1] == 4 and worth[0, -1].isnan() and worth[0, :-1].isfinite().all()


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("n", [1, 2, 33, 150])
@pytest.mark.parametrize("weighted", [False, True])
def test_features_and_their_similarities_lead_the_same_way(monkeypatch, first, n, weighted):
    x = unit_rows(2, n, 16)
    weight = torch.rand(2, n, generator=torch.Generator().manual_seed(2)) if weighted else None
    expected = dispatch.greedy_maxmin(x @ x.mT, n, weight, first, backend="reference")
    ways = [dispatch.greedy_maxmin_features(x, n, weight, first, backend=backend) for backend in PLAIN]
    monkeypatch.setattr(cpu_greedy, "GRAM", 0)
    monkeypatch.setattr(cpu_greedy, "_BLOCK", 7)
    monkeypatch.setattr(eager, "_CHUNK", 7)
    ways += [
        dispatch.greedy_maxmin_features(x, n, weight, first),
        eager.greedy_maxmin_features(x, n, weight, first),
    ]
    for order, worth in ways:
        assert torch.equal(order, expected[0])
        torch.testing.assert_close(worth, expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gram", [0, 4096])
def test_longer_walks_begin_as_shorter_ones(monkeypatch, gram):
    monkeypatch.setattr(cpu_greedy, "GRAM", gram)
    x = unit_rows(1, 60)
    long = dispatch.greedy_maxmin_features(x, 60)[0]
    for k in (1, 7, 30):
        assert torch.equal(dispatch.greedy_maxmin_features(x, k)[0], long[:, :k])


def test_float64_stays_float64():
    x = unit_rows(1, 9).double()
    assert dispatch.greedy_maxmin_features(x, 3)[1].dtype == torch.float64
    assert dispatch.greedy_dpp_features(x, torch.ones(1, 9), 3)[1].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    x = unit_rows(1, 30).to(dtype)
    order, worth = dispatch.greedy_maxmin_features(x, 9)
    assert worth.dtype == torch.float32
    assert torch.equal(order, dispatch.greedy_maxmin_features(x.float(), 9)[0])


# --- determinantal point process ------------------------------------------------------------------


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("form", ["matrix", "features", "streamed"])
def test_each_pick_enlarges_the_determinant_most(monkeypatch, backend, form):
    if form == "streamed":
        monkeypatch.setattr(cpu_greedy, "GRAM", 0)
    x, r = unit_rows(2, 14, 20), torch.rand(2, 14, generator=torch.Generator().manual_seed(3)) + 0.5
    sim = x @ x.mT
    pick = dispatch.greedy_dpp if form == "matrix" else dispatch.greedy_dpp_features
    order, gain = pick(sim if form == "matrix" else x, r, 8, backend=backend)
    for b in range(2):
        kernel = (r[b, :, None] * sim[b] * r[b]).double().numpy()
        picks, before = [], 1.0
        for token, factor in zip(order[b].tolist(), gain[b].tolist(), strict=True):
            rivals = {i: determinant(kernel, [*picks, i]) for i in range(14) if i not in picks}
            assert token == max(rivals, key=rivals.get)
            assert factor == pytest.approx(rivals[token] / before, rel=1e-3)
            picks, before = [*picks, token], rivals[token]


@pytest.mark.parametrize("width", [3, 8])
def test_when_nothing_is_left_tokens_come_by_index(monkeypatch, width):
    x, r = unit_rows(2, 30, width), torch.rand(2, 30, generator=torch.Generator().manual_seed(4)) + 0.2
    expected = dispatch.greedy_dpp(x @ x.mT, r, 30, backend="reference")
    rest = expected[0][:, width:].tolist()
    assert (expected[1][:, width:] == 0).all() and rest == [sorted(row) for row in rest]
    ways = [
        dispatch.greedy_dpp(x @ x.mT, r, 30),
        dispatch.greedy_dpp_features(x, r, 30),
        eager.greedy_dpp_features(x, r, 30),
    ]
    monkeypatch.setattr(cpu_greedy, "GRAM", 0)
    ways.append(dispatch.greedy_dpp_features(x, r, 30))
    for order, gain in ways:
        assert torch.equal(order, expected[0])
        torch.testing.assert_close(gain, expected[1], rtol=1e-3, atol=1e-6)


def test_copies_add_nothing_and_tokens_without_relevance_neither():
    x = torch.eye(3).repeat(1, 2, 1)  # 6 tokens, 3 of them copies
    order, gain = dispatch.greedy_dpp_features(x, torch.tensor([[1.0, 0.0, 0.5, 1.0, 0.0, 0.5]]), 6)
    assert order[0].tolist() == [0, 2, 1, 3, 4, 5]
    torch.testing.assert_close(gain[0], torch.tensor([1.0, 0.25, 0, 0, 0, 0]))


@pytest.mark.parametrize("backend", PLAIN)
def test_relevance_that_is_no_number_comes_last(backend):
    r = torch.ones(1, 9)
    r[0, 2] = math.nan
    for x in (unit_rows(1, 9, 4), unit_rows(1, 9, 20)):
        order, gain = dispatch.greedy_dpp(x @ x.mT, r, 9, backend=backend)
        assert order[0, -1] == 2 and gain[0, -1].isnan()
        order, gain = dispatch.greedy_dpp_features(x, r, 9, backend=backend)
        assert order[0, -1] == 2 and gain[0, -1].isnan()


# --- all of them ----------------------------------------------------------------------------------


def test_samples_choose_as_if_alone():
    x, w = unit_rows(3, 50), torch.rand(3, 50, generator=torch.Generator().manual_seed(5))
    for choose in (
        lambda x, w: dispatch.greedy_maxmin_features(x, 20, w),
        lambda x, w: dispatch.greedy_dpp_features(x, w, 20),
    ):
        together = choose(x, w)
        for b in range(3):
            alone = choose(x[b : b + 1], w[b : b + 1])
            assert torch.equal(together[0][b], alone[0][0]) and torch.equal(together[1][b], alone[1][0])


def test_inputs_are_left_as_they_were():
    x, w = unit_rows(), torch.rand(2, 40, generator=torch.Generator().manual_seed(6))
    sim = x @ x.mT
    before = [t.clone() for t in (x, w, sim)]
    for backend in PLAIN:
        for first in FIRST:
            dispatch.greedy_maxmin(sim, 9, w, first, backend=backend)
            dispatch.greedy_maxmin_features(x, 9, w, first, backend=backend)
        dispatch.greedy_dpp(sim, w, 9, backend=backend)
        dispatch.greedy_dpp_features(x, w, 9, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, w, sim), strict=True))


def test_layouts_do_not_matter():
    x = unit_rows(2, 30, 6)
    sim = x @ x.mT
    odd = torch.stack([sim, sim], dim=-1)[..., 0]
    assert torch.equal(dispatch.greedy_maxmin(odd, 9)[0], dispatch.greedy_maxmin(sim, 9)[0])
    turned = x.mT.contiguous().mT
    assert torch.equal(
        dispatch.greedy_dpp_features(turned, torch.ones(2, 30), 5)[0],
        dispatch.greedy_dpp_features(x, torch.ones(2, 30), 5)[0],
    )
