# SPDX-License-Identifier: Apache-2.0
"""Cells are exactly k, disjoint, covering, non-empty and near-square; centres lie in their cells."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.core.grid import boxes, cells, centres
from vlmprune.errors import InvariantError

side = st.integers(1, 30)


@st.composite
def grid_and_k(draw):
    grid = draw(st.tuples(side, side))
    return grid, draw(st.integers(1, grid[0] * grid[1]))


@st.composite
def grids_and_k(draw):
    grids = tuple(draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5)))
    return grids, draw(st.integers(1, sum(r * c for r, c in grids)))


@given(grid_and_k())
@settings(deadline=None, max_examples=150)
def test_one_grid_is_cut_into_k_rectangles_with_centres_inside(given_):
    (rows, cols), k = given_
    ids = cells([(rows, cols)], k)
    assert ids.dtype == torch.int64
    assert ids.unique().tolist() == list(range(k))
    middle = centres([(rows, cols)], k)
    assert ids[middle].tolist() == list(range(k))
    for cell in range(k):
        y, x = (ids.view(rows, cols) == cell).nonzero(as_tuple=True)
        assert len(y) == (y.max() - y.min() + 1) * (x.max() - x.min() + 1)
        row, col = divmod(int(middle[cell]), cols)
        assert abs(row - (y.min() + y.max()) / 2) <= 0.5
        assert abs(col - (x.min() + x.max()) / 2) <= 0.5


@given(grids_and_k())
@settings(deadline=None, max_examples=150)
def test_several_grids_share_k_in_proportion(given_):
    grids, k = given_
    sizes = [r * c for r, c in grids]
    ids, middle = cells(grids, k), centres(grids, k)
    assert sorted(set(ids.tolist()) - {-1}) == list(range(k))
    assert middle.tolist() == sorted(set(middle.tolist())) and len(middle) == k
    assert ids[middle].tolist() == list(range(k))
    for size, part in zip(sizes, ids.split(sizes), strict=True):
        got = len(set(part.tolist()) - {-1})
        assert abs(got - k * size / sum(sizes)) < 1
        assert (got == 0) == bool((part == -1).any())


def test_keeping_all_is_the_identity():
    assert cells([(3, 5)], 15).tolist() == centres([(3, 5)], 15).tolist() == list(range(15))


def test_square_numbers_give_regular_cells():
    assert cells([(4, 4)], 4).view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert centres([(6, 6)], 4).tolist() == [7, 10, 25, 28]


def test_wide_grids_are_cut_across_first():
    assert cells([(2, 8)], 4).view(2, 8).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    assert cells([(8, 2)], 4).view(8, 2)[:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("k", [32, 64, 128, 192])
def test_cells_of_a_llava_grid_are_near_square(k):
    ids = cells([(24, 24)], k).view(24, 24)
    for cell in range(k):
        y, x = (ids == cell).nonzero(as_tuple=True)
        assert 1 / 3 <= len(y.unique()) / len(x.unique()) <= 3


@pytest.mark.parametrize(("grids", "k"), [([(2, 2)], 0), ([(2, 2)], 5), ([(2, 0), (2, 2)], 1)])
def test_impossible_partitions_are_refused(grids, k):
    with pytest.raises(InvariantError, match="cells"):
        cells(grids, k)


def test_boxes_span_every_grid():
    found = boxes([(2, 2), (1, 4)])
    assert found[:4].tolist() == [[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]]
    assert found[4:].tolist() == [[0, 0, 0.25, 1], [0.25, 0, 0.5, 1], [0.5, 0, 0.75, 1], [0.75, 0, 1, 1]]
