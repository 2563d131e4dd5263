# SPDX-License-Identifier: Apache-2.0
"""FasterVLM against a literal transcription of its formula."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from vlmprune.core.method import Need
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, SpecError
from vlmprune.methods.fastervlm import FasterVLM


def attention(batch=2, heads=4, n=36, seed=0):
    """[CLS] rows of a softmax over 1 + N keys, [CLS] entry cut off."""
    logits = np.random.default_rng(seed).normal(size=(batch, heads, 1 + n))
    rows = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return rows[..., 1:].astype(np.float32)


def transcription(a, k):
    score = a.mean(axis=1)
    return score, np.stack([np.sort(np.argsort(-row, kind="stable")[:k]) for row in score])


@pytest.mark.parametrize("k", [1, 9, 35])
def test_scores_and_kept_sets_follow_the_formula(k):
    a = attention()
    score, keep = transcription(a, k)
    tokens = VisualTokens(cls_attention=torch.from_numpy(a))
    np.testing.assert_allclose(FasterVLM().score(tokens).numpy(), score, rtol=1e-6)
    assert choose(FasterVLM(), tokens, k).tolist() == keep.tolist()


def test_the_most_attended_patch_is_kept_and_the_least_is_not():
    a = attention(batch=1)
    keep = choose(FasterVLM(), VisualTokens(cls_attention=torch.from_numpy(a)), 18)[0].tolist()
    assert a.mean(1).argmax() in keep
    assert a.mean(1).argmin() not in keep


def test_budgets_are_nested_and_rows_independent():
    a = torch.from_numpy(attention())
    kept = [set(choose(FasterVLM(), VisualTokens(cls_attention=a), k)[1].tolist()) for k in range(1, 37)]
    assert all(small < large for small, large in pairwise(kept))
    assert set(choose(FasterVLM(), VisualTokens(cls_attention=a[1:]), 9)[0].tolist()) == kept[8]


def test_half_precision_heads_are_averaged_in_float32():
    a = torch.tensor([[[1.0, 1.0], [0.0, 2**-10]]]).bfloat16()  # in bfloat16 both means round to 0.5
    assert FasterVLM().score(VisualTokens(cls_attention=a)).dtype == torch.float32
    assert choose(FasterVLM(), VisualTokens(cls_attention=a), 1).tolist() == [[1]]


def test_towers_without_cls_use_received_attention():
    received = torch.tensor([[0.1, 0.5, 0.4]])
    method = FasterVLM(cls="mean")
    assert method.needs == (Need("received_attention"),)
    assert choose(method, VisualTokens(received_attention=received), 2).tolist() == [[1, 2]]


def test_needs_and_layout_follow_the_options():
    assert FasterVLM(layer=1).needs == (Need("cls_attention", 1),)
    assert (FasterVLM().layout, FasterVLM(anyres="spatial").layout) == ("packed", "spatial")
    assert FasterVLM(anyres="spatial") == FasterVLM(anyres="spatial") != FasterVLM()


@pytest.mark.parametrize("options", [{"cls": "tokn"}, {"anyres": "flat"}, {"layer": "last"}, {"layer": True}])
def test_unknown_options_are_refused(options):
    with pytest.raises(SpecError, match=f"{next(iter(options))}="):
        FasterVLM(**options)


def test_missing_attention_is_named():
    with pytest.raises(CaptureError, match="'cls_attention'"):
        choose(FasterVLM(), VisualTokens(features=torch.ones(1, 4, 2)), 2)
