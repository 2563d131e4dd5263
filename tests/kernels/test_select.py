# SPDX-License-Identifier: Apache-2.0
"""Selection and rows: the reference against a stable order in plain Python, and every other path against the
reference.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.kernels import dispatch
from vlmprune.kernels.backends import BACKENDS

PLAIN = [name for name in BACKENDS if name != "triton"]
SIZES = (1, 2, 7, 33, 196, 576, 1000, 2880)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 1.0, -1.0, 1.0 + 2**-23)
values = st.sampled_from(SPECIAL) | st.floats(width=32)


def stable_order(row):
    """Indices from the highest to the lowest: the lower index first among equals, NaN last."""
    number = [i for i, value in enumerate(row) if not math.isnan(value)]
    return sorted(number, key=lambda i: -row[i]) + [i for i, value in enumerate(row) if math.isnan(value)]


def highest(row, k):
    return sorted(stable_order(row)[:k])


def tied(batch, n, seed, distinct=9):
    """Scores (B, N) that repeat, special values among them."""
    pool = torch.tensor(SPECIAL)[:distinct]
    return pool[torch.randint(0, len(pool), (batch, n), generator=torch.Generator().manual_seed(seed))]


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- one budget -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", PLAIN)
@given(st.data())
@settings(deadline=None, max_examples=120)
def test_the_highest_are_kept(backend, data):
    n = data.draw(st.integers(1, 12))
    rows = data.draw(st.lists(st.lists(values, min_size=n, max_size=n), min_size=1, max_size=3))
    k = data.draw(st.integers(0, n + 3))
    idx = dispatch.topk_select(torch.tensor(rows), k, backend=backend)
    assert idx.dtype == torch.int32 and idx.is_contiguous()
    assert idx.tolist() == [highest(row, k) for row in rows]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["drawn", "tied", "equal", "half"])
def test_all_sizes_and_budgets(n, kind):
    scores = {
        "drawn": drawn(2, n),
        "tied": tied(2, n, n),
        "equal": torch.full((2, n), 0.5),
        "half": drawn(2, n).bfloat16(),
    }[kind]
    orders = [stable_order(row) for row in scores.tolist()]
    for k in {0, 1, n // 9, n - 1, n, n + 1}:
        expected = [sorted(order[:k]) for order in orders]
        for backend in PLAIN:
            assert dispatch.topk_select(scores, k, backend=backend).tolist() == expected, (backend, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_scores_of_any_real_type_are_ranked(dtype):
    scores = torch.tensor([[0, 1, 0, 1, 1]]).to(dtype)
    for backend in PLAIN:
        assert dispatch.topk_select(scores, 2, backend=backend).tolist() == [[1, 3]]


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("k", [0, 1, 8, 9, 10, 99])
@pytest.mark.parametrize("batch", [1, 3])
def test_pruning_keeps_selected_rows(backend, k, batch):
    scores = tied(batch, 9, k)
    xs = [drawn(batch, 9, 5, dtype=torch.bfloat16), torch.arange(batch * 9).view(batch, -1)]
    idx, ys = dispatch.prune(scores, k, xs, backend=backend)
    for b in range(batch):
        picks = highest(scores[b].tolist(), k)
        assert idx[b].tolist() == picks
        for x, y in zip(xs, ys, strict=True):
            assert torch.equal(y[b], x[b][picks])


FORMS = {
    "contiguous": lambda x: x,
    "without the first token": lambda x: torch.cat([x[:, :1], x], dim=1)[:, 1:],
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other column": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "of a reversed batch": lambda x: x.flip(0),
}


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_rows_are_gathered_from_any_layout(backend, form, dtype):
    x = FORMS[form](drawn(3, 7, 5, dtype=torch.float64).mul(9).to(dtype))
    idx = torch.tensor([[6, 0, 0], [1, 2, 3], [5, 4, 6]])
    (y,) = dispatch.gather_rows([x], idx, backend=backend)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, torch.stack([x[b][idx[b]] for b in range(3)]))


@pytest.mark.parametrize("backend", PLAIN)
def test_rows_return_to_their_places_and_repeated_ones_add_up(backend):
    g, idx = drawn(2, 3, 4), torch.tensor([[0, 2, 4], [5, 1, 5]])
    full = dispatch.unprune(g, idx, 6, backend=backend)
    expected = torch.zeros(2, 6, 4)
    for b in range(2):
        for row, place in enumerate(idx[b].tolist()):
            expected[b, place] += g[b, row]
    assert torch.equal(full, expected)
    assert torch.equal(dispatch.unprune(g[:1], idx[:1], 6, ordered=True, backend=backend), expected[:1])


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize(("batch", "n"), [(0, 4), (2, 0), (0, 0)])
def test_nothing_comes_of_nothing(backend, batch, n):
    scores, x = torch.zeros(batch, n), torch.zeros(batch, n, 3)
    k = min(2, n)
    assert dispatch.topk_select(scores, 2, backend=backend).shape == (batch, k)
    idx, (y,) = dispatch.prune(scores, 2, [x], backend=backend)
    assert idx.shape == (batch, k) and y.shape == (batch, k, 3)
    nowhere = torch.zeros(batch, 0, dtype=torch.int64)
    assert dispatch.unprune(torch.zeros(batch, 0, 3), nowhere, n, backend=backend).shape == (batch, n, 3)
    assert dispatch.gather_rows([], nowhere, backend=backend) == []
    for order, worth in (
        dispatch.greedy_maxmin(torch.zeros(batch, n, n), 2, backend=backend),
        dispatch.greedy_maxmin_features(torch.zeros(batch, n, 3), 2, backend=backend),
        dispatch.greedy_dpp(torch.zeros(batch, n, n), scores, 2, backend=backend),
        dispatch.greedy_dpp_features(torch.zeros(batch, n, 3), scores, 2, backend=backend),
    ):
        assert order.shape == worth.shape == (batch, k) and order.dtype == torch.int32


@pytest.mark.parametrize("backend", PLAIN)
def test_keeping_all_gives_a_copy(backend):
    x, scores = drawn(2, 4, 3), drawn(2, 4)
    _, (y,) = dispatch.prune(scores, 4, [x], backend=backend)
    y.zero_()
    assert x.abs().sum() > 0
