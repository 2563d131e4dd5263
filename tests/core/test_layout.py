# SPDX-License-Identifier: Apache-2.0
"""Order of rows over tiles, against a literal walk over the big image."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.errors import InvariantError
from vlmprune.hooks.vision.tiles import pack_tiles


def walk(slots, wide, high, side, mask):
    tiles, rows = len(slots), len(slots[0])
    order = list(range(rows))
    for y in range(high * side):
        for x in range(wide * side):
            tile = 1 + y // side * wide + x // side
            order += [
                tile * rows + r
                for r in range(rows)
                if mask[r] and slots[tile][r] == y % side * side + x % side
            ]
    left = [(t, r) for t in range(1, tiles) for r in range(rows) if t * rows + r not in order]
    order += [t * rows + r for t, r in left if slots[t][r] < 0]
    return order + [t * rows + r for t, r in left if slots[t][r] >= 0]


@given(st.data())
@settings(deadline=None, max_examples=100)
def test_order_is_the_walk_over_the_big_image(data):
    wide, high, side = (data.draw(st.integers(1, 4)) for _ in range(3))
    rows = data.draw(st.integers(1, side * side))
    tile = st.permutations(range(side * side)).map(lambda patches: patches[:rows])
    slots = [list(data.draw(tile)) for _ in range(1 + wide * high)]
    mask = [data.draw(st.booleans()) for _ in range(rows)]
    if not mask[0]:
        for row in slots:
            row[0] = -1
    order = pack_tiles(torch.tensor(slots), (wide, high), side, torch.tensor(mask))
    assert order.tolist() == walk(slots, wide, high, side, mask)


def test_all_rows_interleave_by_default():
    slots = torch.tensor(
        [[0, 3], [1, 2], [0, 3]]
    )  # base tile, then two tiles side by side, 2 x 2 patches each
    assert pack_tiles(slots, (2, 1), 2).tolist() == [0, 1, 2, 4, 3, 5]


def test_a_lone_base_tile_is_left_alone():
    assert pack_tiles(torch.tensor([[3, 1, -1]]), (0, 0), 2).tolist() == [0, 1, 2]


def test_tiles_must_fill_the_grid():
    with pytest.raises(InvariantError, match="3 tiles do not form a base tile and a 2 x 2 grid; expected 5"):
        pack_tiles(torch.zeros(3, 1, dtype=torch.int64), (2, 2), 2)
