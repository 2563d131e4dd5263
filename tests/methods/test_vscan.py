# SPDX-License-Identifier: Apache-2.0
"""VScan: both choices and the merge against literal transcriptions, and its two stages in one forward."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import vlmprune
from vlmprune.core.budget import Budget
from vlmprune.core.method import CutPoint, Need
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.vscan import SecondStage, VScan, borders, official_keep, windows
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model

TINY = "vscan(shallow=1,second=(2,{}))@{}"


def tokens(grids=((12, 12),), batch=2, seed=0):
    rng = np.random.default_rng(seed)
    count = sum(rows * cols for rows, cols in grids)

    def uniform(*shape):
        return torch.from_numpy(rng.random(shape).astype(np.float32))

    return VisualTokens(
        features=uniform(batch, count, 8) - 0.5,
        cls_attention=uniform(batch, 3, count),
        of_layers={Need("cls_attention", 6): uniform(batch, 3, count)},
        grids=grids,
    )


def by_hand(given, row, k, side=6):
    """Kept tokens and merged rows of one row of tokens on one grid."""
    ((rows, cols),) = given.grids
    a = given.of_layers[Need("cls_attention", 6)][row].numpy().mean(axis=0)
    A = given.cls_attention[row].numpy().mean(axis=0)
    down, across = (max(1, round(length / side)) for length in (rows, cols))
    w, kept = k // 2 // (down * across), []
    for i in range(down):
        for j in range(across):
            ys = range(rows * i // down, rows * (i + 1) // down)
            xs = range(cols * j // across, cols * (j + 1) // across)
            kept += sorted((y * cols + x for y in ys for x in xs), key=lambda t: (-a[t], t))[:w]
    others = sorted((t for t in range(rows * cols) if t not in kept), key=lambda t: (-A[t], t))
    kept = sorted(kept + others[: k - len(kept)])
    x = given.features[row].numpy().astype(np.float64)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    groups = {t: [x[t]] for t in kept}
    for t in range(rows * cols):
        if t not in groups:
            groups[max(kept, key=lambda s: (unit[t] @ unit[s], -s))].append(x[t])
    return kept, np.stack([np.mean(groups[t], axis=0) for t in kept])


@pytest.mark.parametrize(
    ("grid", "k"), [((12, 12), 24), ((12, 12), 29), ((7, 9), 13), ((5, 20), 60), ((6, 6), 1)]
)
def test_windows_choose_half_and_the_rest_is_merged_in(grid, k):
    given = tokens((grid,))
    merged = choose(VScan(), given, k)
    for row in range(2):
        kept, rows = by_hand(given, row, k)
        assert merged.slots[row].tolist() == kept
        np.testing.assert_allclose(merged.features[row].numpy(), rows, rtol=1e-5, atol=1e-6)
    bare = choose(VScan(merging="none"), given, k)
    assert torch.equal(bare.slots, merged.slots)
    assert torch.equal(bare.features[1], given.features[1, merged.slots[1]])


@pytest.mark.parametrize("k", [1, 9, 40, 150, 169])
def test_blocks_of_any_size_have_windows(k):
    given = tokens(((12, 12), (1, 2), (4, 6)))  # the smallest window holds two tokens
    assert choose(VScan(), given, k).slots.shape == (2, k)


def test_windows_cover_the_grid_once():
    members = windows(((7, 9), (2, 13)), 6)
    assert sorted(members[members >= 0].tolist()) == list(range(63 + 26))
    assert borders(24, 6) == [0, 6, 12, 18, 24] and borders(9, 6) == [0, 4, 9] and borders(2, 6) == [0, 2]


def test_ties_go_to_the_lower_index():
    flat = VisualTokens(
        features=torch.ones(1, 36, 2),
        cls_attention=torch.ones(1, 1, 36),
        of_layers={Need("cls_attention", 6): torch.ones(1, 1, 36)},
        grids=((6, 6),),
    )
    merged = choose(VScan(), flat, 4)
    assert merged.slots.tolist() == [[0, 1, 2, 3]]


def test_half_precision_is_averaged_in_float32():
    given = tokens()
    half = replace(given, features=given.features.half())
    merged = choose(VScan(), half, 20)
    want = choose(VScan(), replace(given, features=half.features.float()), 20)
    assert merged.features.dtype == torch.float16 and torch.equal(merged.slots, want.slots)
    torch.testing.assert_close(merged.features, want.features.half(), rtol=0, atol=0)


@pytest.mark.parametrize(("asked", "kept"), [(58, 45), (100, 98), (96, 96), (20, 10), (192, 192)])
def test_official_counts(asked, kept):
    assert official_keep(asked) == kept


# --- the second stage -----------------------------------------------------------------------------


def test_the_second_stage_counts_what_the_first_left():
    assert SecondStage(16, 32, Budget(96)).cuts(32, None, 576) == (CutPoint(16, 32, source=16),)
    assert SecondStage(14, 0.333, Budget(0.167)).cuts(28, None, 1000) == (CutPoint(14, 55, source=14),)
    assert VScan(second=(16, 32)).later(Budget(1.0)) == () == VScan().later(Budget(96))


def test_both_stages_act_in_one_forward_and_equal_two_methods():
    """The same as the first stage beside a cut of the same kind under another name."""
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1, 2, 0))
    with vlmprune.prune(model, TINY.format(4, 12)) as run:
        ids = generate(model, inputs)
        report = run.last
    assert report.tokens_per_layer == [12, 12, 4, 4] and report.realised_tokens == [4, 4, 4]
    share = f"({4 / 36},)"
    two = f"vscan(shallow=1)@12+pyramiddrop(layers=(2,),shares={share})"
    with vlmprune.prune(model, two) as other:
        assert torch.equal(generate(model, inputs), ids)
        assert [kept.keep_idx.tolist() for kept in other.last.keep] == [
            kept.keep_idx.tolist() for kept in report.keep
        ]


def test_a_share_is_one_of_what_is_left():
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    with vlmprune.prune(model, TINY.format(0.5, 12)) as run, torch.no_grad():
        model(**inputs)
    assert run.last.tokens_per_layer == [12, 12, 6, 6]


def test_a_budget_of_everything_is_the_dense_model():
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, TINY.format(4, 1.0)):
            assert torch.equal(model(**inputs).logits, dense)


def test_a_third_cut_is_refused():
    with pytest.raises(UnsupportedError, match="vscan and fastv both act in the slot 'inside_lm'"):
        vlmprune.prune(tiny_model("llava"), TINY.format(4, 12) + "+fastv@4")


@pytest.mark.parametrize(
    "options",
    [
        {"second": (0, 4)},
        {"second": (2, 1.5)},
        {"shallow": 0},
        {"window": 0},
        {"merging": "add"},
        {"local": 2},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(SpecError):
        VScan(**options)
    with pytest.raises(SpecError, match=r"layers 0\.\.3"):
        vlmprune.prune(tiny_model("llava"), "vscan(shallow=1,second=(4,9))@12")
