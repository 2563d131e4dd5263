# SPDX-License-Identifier: Apache-2.0
"""HiPrune against a literal transcription of its steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmprune import select
from vlmprune.core.method import Need
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, SpecError
from vlmprune.hooks.vision.capture import block_index
from vlmprune.methods.hiprune import HiPrune, neighbourhoods

MIDDLE = Need("received_attention", 0.375)


def attention(n, seed, batch=2):
    rows = np.random.default_rng(seed).random((batch, n))
    return (rows / rows.sum(1, keepdims=True)).astype(np.float32)


def tokens_of(deep, middle, grids):
    deep, middle = (torch.as_tensor(x) for x in (deep, middle))
    return VisualTokens(received_attention=deep, of_layers={MIDDLE: middle}, grids=grids)


def transcription(deep, middle, grid, k, alpha, official=False):
    """One picture of one block."""
    rows, cols = grid
    kept = set()
    for i in np.argsort(-middle, kind="stable")[: round(k * alpha / 5)].tolist():
        r, c = divmod(i, cols)
        if official:
            group = {min(max(i + step, 0), rows * cols - 1) for step in (0, -1, 1, -cols, cols)}
        else:
            sides = ((r, c), (r, c - 1), (r, c + 1), (r - 1, c), (r + 1, c))
            group = {y * cols + x for y, x in sides if 0 <= y < rows and 0 <= x < cols}
        if len(kept | group) > k:
            break
        kept |= group
    for i in np.argsort(-deep, kind="stable").tolist():
        if len(kept) < k:
            kept.add(i)
    return sorted(kept)


@pytest.mark.parametrize("variant", ["grid", "official"])
@pytest.mark.parametrize(("k", "alpha"), [(12, 0.5), (30, 0.9), (3, 1.0), (16, 1.0), (34, 0.1), (5, 0.0)])
def test_kept_sets_follow_the_steps(variant, k, alpha):
    for seed in range(8):
        deep, middle = attention(35, seed), attention(35, 100 + seed)
        method = HiPrune(alpha=alpha, variant=variant)
        keep = choose(method, tokens_of(deep, middle, ((5, 7),)), k)
        for row in range(2):
            want = transcription(deep[row], middle[row], (5, 7), k, alpha, variant == "official")
            assert keep[row].tolist() == want
        alone = choose(method, tokens_of(deep[1:], middle[1:], ((5, 7),)), k)
        assert alone[0].tolist() == keep[1].tolist()


def test_anchors_too_many_for_the_budget_are_dropped_from_the_weakest_on():
    middle = torch.zeros(1, 49)
    middle[0, 24], middle[0, 3], middle[0, 45] = 3.0, 2.0, 1.0  # five, four and four tokens
    deep = torch.arange(49.0)[None] / 1000
    keep = choose(HiPrune(alpha=1.0, min_anchors=3), tokens_of(deep, middle, ((7, 7),)), 9)
    assert keep.tolist() == [[2, 3, 4, 10, 17, 23, 24, 25, 31]]


def test_neighbours_stay_in_their_block():
    around = neighbourhoods(((2, 3), (1, 2)))
    assert sorted(around[3].tolist()) == [-1, -1, 0, 3, 4]  # the left rim of the second row
    assert sorted(around[6].tolist()) == [-1, -1, -1, 6, 7]  # the second block does not touch the first


def test_ties_go_to_the_lower_index():
    flat = torch.full((1, 16), 1 / 17)
    keep = choose(HiPrune(alpha=0.0), tokens_of(flat, flat, ((4, 4),)), 5)
    assert keep.tolist() == [[0, 1, 2, 3, 4]]
    method = HiPrune(alpha=0.0, min_anchors=2)
    assert method.anchors(tokens_of(flat, flat, ((4, 4),)), 5).tolist() == [[0, 1]]


def test_the_share_of_the_depth_is_the_published_block():
    assert block_index(0.375, 24) == 8
    assert block_index(0.375, 32, [7, 15, 23, 31]) == 15
    assert (block_index(0.01, 4), block_index(1.0, 4)) == (0, 3)
    assert block_index(1.0, 32, [7, 15]) == 31  # no block from there on attends to all of the picture


def test_plain_tensors_name_the_layer_and_its_lack():
    deep, middle = torch.as_tensor(attention(16, 0)), torch.as_tensor(attention(16, 1))
    keep = select("hiprune(alpha=1.0)", 6, received_attention=deep, of_layers={MIDDLE: middle}, grid=(4, 4))
    assert keep.shape == (2, 6)
    with pytest.raises(CaptureError, match=r"layer 0\.375"):
        select("hiprune", 6, received_attention=deep, grid=(4, 4))


def test_needs_name_both_layers():
    assert HiPrune().needs == (Need("received_attention"), MIDDLE)
    assert HiPrune(layer=-2, object_layer=9).needs[1] == Need("received_attention", 9)


@pytest.mark.parametrize(
    "options",
    [{"alpha": 1.5}, {"object_layer": 1.5}, {"object_layer": True}, {"variant": "x"}, {"min_anchors": -1}],
)
def test_unknown_options_are_refused(options):
    with pytest.raises(SpecError, match=f"{next(iter(options))}="):
        HiPrune(**options)
