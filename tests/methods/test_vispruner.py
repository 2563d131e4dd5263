# SPDX-License-Identifier: Apache-2.0
"""VisPruner against a literal transcription of its rounds, at all budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmprune.core.budget import share_of
from vlmprune.core.method import Need
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.vispruner import VisPruner


def inputs(batch=2, heads=3, n=36, width=8, seed=0, **dtype):
    draw = np.random.default_rng(seed).normal
    attention = torch.from_numpy(draw(size=(batch, heads, 1 + n))).softmax(-1)[..., 1:]
    encoded = torch.from_numpy(draw(size=(batch, n, width)))
    return VisualTokens(cls_attention=attention.float(), encoder_features=encoded.float().to(**dtype))


def transcription(a, x, k, share=0.5, step=8, raster=False):
    """Both halves of one picture as lists, in their order."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    order = np.argsort(-a.mean(0), kind="stable").tolist()
    first = int(round(k * share, 6))
    residual, left = order[first:], k - first
    while left and len(residual) > left:
        residual = sorted(residual) if raster else residual
        even, odd = residual[::2], residual[1::2]
        twin = [max(unit[i] @ unit[j] for j in odd) for i in even]
        by_twin = [even[i] for i in np.argsort(-np.array(twin), kind="stable")]
        residual = by_twin[min(step, len(residual) - left) :] + odd
    return order[:first], residual if left else []


@pytest.mark.parametrize("k", range(1, 36))
def test_every_budget_follows_the_rounds(k):
    """The official code raises for half of these."""
    tokens, method = inputs(), VisPruner()
    important, diverse = method.halves(tokens, k)
    for row in range(2):
        a, x = tokens.cls_attention[row].numpy(), tokens.encoder_features[row].numpy()
        assert (important[row].tolist(), diverse[row].tolist()) == transcription(a, x, k)
    assert choose(method, tokens, k).shape == (2, k)


@pytest.mark.parametrize(
    "options", [{"important": 0.75}, {"important": 0.0}, {"important": 1.0}, {"step": 1}, {"step": 50}]
)
def test_options_follow_the_rounds(options):
    tokens = inputs(n=25)
    important, diverse = VisPruner(**options).halves(tokens, 8)
    for row in range(2):
        a, x = tokens.cls_attention[row].numpy(), tokens.encoder_features[row].numpy()
        want = transcription(a, x, 8, options.get("important", 0.5), options.get("step", 8))
        assert (important[row].tolist(), diverse[row].tolist()) == want


def test_the_raster_list_is_another_one():
    tokens = inputs(batch=1)
    _, diverse = VisPruner(residual="raster").halves(tokens, 9)
    a, x = tokens.cls_attention[0].numpy(), tokens.encoder_features[0].numpy()
    assert diverse[0].tolist() == transcription(a, x, 9, raster=True)[1]
    assert diverse[0].tolist() != VisPruner().halves(tokens, 9)[1][0].tolist()


def test_of_two_copies_one_goes_first():
    x = torch.eye(8)[None].clone()
    x[0, 5] = x[0, 4]
    attention = torch.arange(8, 0, -1.0).view(1, 1, 8) / 40  # raster order is that of attention
    keep = choose(VisPruner(), VisualTokens(cls_attention=attention, encoder_features=x), 7)
    assert keep.tolist() == [[0, 1, 2, 3, 4, 6, 7]]  # of the others 3 4 5 6 7, 5 is at an even place
    keep = choose(VisPruner(important=0.6), VisualTokens(cls_attention=attention, encoder_features=x), 7)
    assert keep.tolist() == [[0, 1, 2, 3, 5, 6, 7]]  # of 4 5 6 7, 4 is


def test_the_most_attended_patches_are_kept():
    tokens = inputs(batch=1)
    keep, a = set(choose(VisPruner(), tokens, 10)[0].tolist()), tokens.cls_attention[0].mean(0)
    assert set(a.argsort(descending=True)[:5].tolist()) <= keep


def test_rows_of_a_batch_do_not_mix():
    tokens = inputs()
    alone = VisualTokens(cls_attention=tokens.cls_attention[1:], encoder_features=tokens.encoder_features[1:])
    assert choose(VisPruner(), tokens, 9)[1].tolist() == choose(VisPruner(), alone, 9)[0].tolist()


def test_half_precision_keeps_the_important_half():
    tokens, half = inputs(), inputs(dtype=torch.bfloat16)
    assert torch.equal(VisPruner().halves(tokens, 12)[0], VisPruner().halves(half, 12)[0])


def test_zero_features_and_ties_are_no_error():
    flat = VisualTokens(cls_attention=torch.full((1, 2, 9), 0.1), encoder_features=torch.zeros(1, 9, 4))
    important, diverse = VisPruner().halves(flat, 4)
    assert important.tolist() == [[0, 1]]
    # of 2 4 6 8 the first five of seven would go, four are there; then one of 3 5 7
    assert diverse.shape == (1, 2) and choose(VisPruner(), flat, 4).shape == (1, 4)


def test_patches_merged_to_one_token_are_compared_side_by_side():
    attention, x = torch.rand(1, 9).softmax(-1), torch.randn(1, 36, 4)
    method = VisPruner(cls="mean")
    merging = VisualTokens(received_attention=attention, encoder_features=x)
    joined = VisualTokens(received_attention=attention, encoder_features=x.view(1, 9, 16))
    assert choose(method, merging, 4).tolist() == choose(method, joined, 4).tolist()


def test_shares_are_rounded_down_from_the_true_product():
    assert (share_of(100, 0.29), share_of(9, 0.5), share_of(1, 0.5)) == (29, 4, 0)


def test_units_too_large_for_all_pairs_are_refused_by_name():
    VisPruner().check_unit(4096)
    with pytest.raises(UnsupportedError, match="vispruner compares all pairs"):
        VisPruner().check_unit(4097)


def test_needs_and_layout_follow_the_options():
    assert VisPruner(layer=1).needs == (Need("cls_attention", 1), Need("encoder_features"))
    assert VisPruner(anyres="spatial").layout == "spatial"


@pytest.mark.parametrize("options", [{"important": 1.5}, {"step": 0}, {"residual": "x"}, {"cls": "none"}])
def test_unknown_options_are_refused(options):
    with pytest.raises(SpecError, match=f"{next(iter(options))}="):
        VisPruner(**options)
