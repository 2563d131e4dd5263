# SPDX-License-Identifier: Apache-2.0
"""SCOPE against a literal transcription of its greedy loop."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import InvariantError, SpecError, UnsupportedError
from vlmprune.methods.pairs import LARGEST, patch_rows, unit
from vlmprune.methods.scope import SCOPE, cover_salient
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(batch=2, heads=4, n=40, seed=1):
    return (drawn(batch, heads, n, seed=seed) * 2).softmax(-1)


def tokens(batch=2, n=40, seed=0, **others):
    return VisualTokens(
        encoder_features=drawn(batch, n, 12, seed=seed), cls_attention=attention(batch, n=n), **others
    )


def transcription(x, saliency, k, combine="product"):
    """One picture, float64: patches x (N, C), saliency (N,)."""
    x = x.double()
    x = x / x.norm(dim=-1, keepdim=True)
    cosines, m, picks = x @ x.T, torch.zeros(len(x)).double(), []
    for _ in range(k):
        value = []
        for j in range(len(x)):
            gain = sum(max(0.0, float(cosines[i, j] - m[i])) for i in range(len(x)))
            value.append(gain * float(saliency[j]) if combine == "product" else gain + float(saliency[j]))
        picks.append(max((j for j in range(len(x)) if j not in picks), key=lambda j: (value[j], -j)))
        m = torch.maximum(m, cosines[picks[-1]])
    return picks


@pytest.mark.parametrize("combine", ["product", "sum"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_picks_follow_the_paper(alpha, combine):
    given, method = tokens(n=24), SCOPE(alpha=alpha, combine=combine)
    k = 6  # of the last few, two that cover each other gain the same
    order, _ = cover_salient(patch_rows(given), method.saliency(given) ** alpha, k, combine)
    for row in range(2):
        saliency = given.cls_attention[row].double().sum(0) ** alpha
        assert order[row].tolist() == transcription(given.encoder_features[row], saliency, k, combine)
    assert torch.equal(choose(method, given, k), order.sort(1).values)


def test_heads_are_added_up_and_do_not_matter_for_the_product():
    given = tokens()
    mean = VisualTokens(
        encoder_features=given.encoder_features, cls_attention=given.cls_attention.mean(1, keepdim=True)
    )
    assert torch.equal(choose(SCOPE(), given, 9), choose(SCOPE(), mean, 9))
    torch.testing.assert_close(SCOPE().saliency(given), given.cls_attention.sum(1))


def test_without_saliency_the_most_central_patch_comes_first():
    x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.8, 0.3], [-1.0, 0.0]]])
    flat = VisualTokens(encoder_features=x, cls_attention=torch.full((1, 1, 4), 0.25))
    assert choose(SCOPE(), flat, 1).tolist() == [[1]]
    assert choose(SCOPE(), flat, 2).tolist() == [[1, 3]]  # negative cosines cover nothing


def test_copies_of_a_pick_are_taken_last_and_never_twice():
    x = drawn(1, 6, 8).repeat(1, 2, 1)
    given = VisualTokens(encoder_features=x, cls_attention=attention(1, n=6).repeat(1, 1, 2))
    order, _ = cover_salient(patch_rows(given), SCOPE().saliency(given), 12)
    assert sorted(order[0].tolist()) == list(range(12))
    assert len({token % 6 for token in order[0, :6].tolist()}) == 6


def test_ties_go_to_the_lower_index():
    x = torch.eye(5)[None]
    given = VisualTokens(encoder_features=x, cls_attention=torch.full((1, 1, 5), 0.2))
    assert cover_salient(patch_rows(given), SCOPE().saliency(given), 5)[0].tolist() == [[0, 1, 2, 3, 4]]


def test_larger_budgets_keep_what_smaller_ones_keep_and_rows_are_alone():
    given = tokens()
    before: set[int] = set()
    for k in (3, 9, 20):
        keep = choose(SCOPE(), given, k)
        alone = VisualTokens(
            encoder_features=given.encoder_features[1:], cls_attention=given.cls_attention[1:]
        )
        assert torch.equal(choose(SCOPE(), alone, k)[0], keep[1])
        assert before <= set(keep[1].tolist())
        before = set(keep[1].tolist())


def test_a_row_of_zeros_harms_no_other():
    x = drawn(1, 12, 8)
    x[0, 4] = 0
    given = VisualTokens(encoder_features=x, cls_attention=attention(1, n=12))
    assert choose(SCOPE(), given, 11).tolist() == [[0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]]


def test_half_precision_is_compared_in_float32():
    given = tokens()
    half = VisualTokens(
        encoder_features=given.encoder_features.bfloat16(), cls_attention=given.cls_attention.bfloat16()
    )
    same = VisualTokens(
        encoder_features=half.encoder_features.float(), cls_attention=half.cls_attention.float()
    )
    assert torch.equal(choose(SCOPE(), half, 20), choose(SCOPE(), same, 20))


def test_where_patches_become_a_token_the_tokens_are_compared():
    features = drawn(2, 10, 8)
    merged = VisualTokens(features=features, encoder_features=drawn(2, 40, 12), cls_attention=attention(n=10))
    torch.testing.assert_close(patch_rows(merged), unit(features))
    whole = VisualTokens(features=features, encoder_features=drawn(2, 10, 12), cls_attention=attention(n=10))
    torch.testing.assert_close(patch_rows(whole), unit(whole.encoder_features))


def test_received_attention_stands_in_where_there_is_no_cls():
    features, received = drawn(1, 12, 8), drawn(1, 12, seed=3).abs()
    keep = vlmprune.select("scope(cls=mean)", keep=4, encoder_features=features, received_attention=received)
    named = vlmprune.select(
        "scope", keep=4, encoder_features=features, cls_attention=received[:, None]
    )  # one head
    assert torch.equal(keep, named)


@pytest.mark.parametrize("field", ["encoder_features", "cls_attention"])
def test_numbers_that_are_none_are_refused(field):
    given = tokens()
    getattr(given, field)[0, 2, 3] = torch.nan
    with pytest.raises(InvariantError, match=r"scope: .*Check the"):
        choose(SCOPE(), given, 4)


def test_options_and_units_that_make_no_sense_are_refused():
    for options in ({"alpha": -1.0}, {"alpha": True}, {"combine": "max"}, {"cls": "both"}, {"layer": 1.5}):
        with pytest.raises(SpecError, match=next(iter(options))):
            SCOPE(**options)
    SCOPE().check_unit(LARGEST)
    with pytest.raises(
        UnsupportedError, match=rf"scope .* at most {LARGEST}; this one has {LARGEST + 1}.*/crop"
    ):
        SCOPE().check_unit(LARGEST + 1)


def test_keep_all_is_dense():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", images=(1,))
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, "scope@1.0"):
            assert torch.equal(model(**inputs).logits, dense)
