# SPDX-License-Identifier: Apache-2.0
"""AdaptInfer against a literal transcription of its formula, its budgets, and the slow twin in a model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import vlmprune
from vlmprune.core.budget import Budget
from vlmprune.core.method import CutPoint
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.methods.adaptinfer import DEPTH, LAYERS, AdaptInfer, counted_mean, stage_budgets, text_weights
from vlmprune.methods.depths import scaled_layers
from vlmprune.testing.checks_inside import cut_equals_twin
from vlmprune.testing.conformance import Subject
from vlmprune.testing.tiny import tiny_inputs, tiny_model

HEADS, TEXT, N = 3, 6, 20


def attention(seed=0, batch=2):
    """Causal rows of the text over itself and over the picture: (B, H, T, T) and (B, H, T, N)."""
    rng = np.random.default_rng(seed)
    rows = rng.random((batch, HEADS, TEXT, N + TEXT)).astype(np.float32)
    rows[..., N:] *= np.tril(np.ones((TEXT, TEXT), np.float32))
    rows /= rows.sum(axis=-1, keepdims=True)
    return torch.from_numpy(rows[..., N:]), torch.from_numpy(rows[..., :N])


def by_hand(own, to_picture, mix=1.0):
    """(N,) score of one row, from whole matrices in float64."""
    total = np.zeros(N)
    for A, B in zip(own.double().numpy(), to_picture.double().numpy(), strict=True):
        S = A + A.T - np.diag(np.diag(A))
        S = mix * S + (1 - mix) * S.mean()
        total += S.sum(axis=0) @ B
    return total


@pytest.mark.parametrize("mix", [1.0, 0.4, 0.0])
def test_text_is_weighed_by_the_attention_it_gives_and_gets(mix):
    own, seen = attention()
    tokens = VisualTokens(text_attention=seen, text_to_text=own)
    want = np.stack([by_hand(own[row], seen[row], mix) for row in range(2)])
    np.testing.assert_allclose(AdaptInfer(mix=mix).score(tokens).numpy(), want, rtol=2e-5)
    keep = [sorted(np.argsort(-row, kind="stable")[:6].tolist()) for row in want]
    assert choose(AdaptInfer(mix=mix), tokens, 6).tolist() == keep


@pytest.mark.parametrize("mix", [1.0, 0.4])
def test_filling_of_shorter_text_counts_for_nothing(mix):
    own, seen = attention(seed=1, batch=1)
    alone = AdaptInfer(mix=mix).score(VisualTokens(text_attention=seen, text_to_text=own))
    order = [TEXT - 1, TEXT - 1, *range(TEXT)]
    mask = torch.tensor([[False, False] + [True] * TEXT])
    padded = VisualTokens(
        text_attention=seen[:, :, order], text_to_text=own[:, :, order][..., order], query_mask=mask
    )
    torch.testing.assert_close(AdaptInfer(mix=mix).score(padded), alone)
    assert not text_weights(padded.text_to_text, mask, mix)[:, :, :2].any()


def test_ties_go_to_the_lower_index():
    flat = VisualTokens(text_attention=torch.full((1, 2, 3, 8), 0.1), text_to_text=torch.ones(1, 2, 3, 3))
    assert choose(AdaptInfer(), flat, 3).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("depth", "keep", "layers", "budgets", "mean"),
    [
        (32, 128, (1, 10, 20), (290, 72, 18), 128.8125),
        (32, 64, (1, 10, 20), (133, 27, 3), 64.96875),
        (32, 48, (1, 10, 20), (80, 24, 2), 48.75),
        (32, 32, (1, 10, 20), (40, 12, 0), 33.0),
        (40, 64, (1, 11, 21), (148, 40, 5), 63.775),
    ],
)
def test_published_budgets(depth, keep, layers, budgets, mean):
    points = AdaptInfer().cuts(depth, Budget(keep), 576)
    assert points == tuple(CutPoint(a + 1, b, a) for a, b in zip(layers, budgets, strict=True))
    assert counted_mean(layers, budgets, depth, 576) == pytest.approx(mean)


@pytest.mark.parametrize("spec", ["adaptinfer@0.5", "adaptinfer@18"])
def test_a_model_as_deep_as_the_larger_published_one_is_cut_where_it_was(spec):
    model = tiny_model("llava", layers=40)
    with torch.no_grad(), vlmprune.prune(model, spec) as run:
        model(**tiny_inputs("llava", images=(1,)))
    read = run.last.tokens_per_layer
    assert [layer for layer, (before, after) in enumerate(pairwise(read)) if after < before] == [1, 11, 21]


@pytest.mark.parametrize(("keep", "count", "depth"), [(192, 576, 32), (40, 729, 28), (9, 36, 4)])
def test_other_budgets_come_as_near_to_the_mean_as_they_may(keep, count, depth):
    layers = scaled_layers(LAYERS, DEPTH, depth)
    budgets = stage_budgets(keep, layers, depth, count)
    ratio = 0.25 if keep >= 100 else 0.2
    more = (budgets[0] + 1, int(ratio * (budgets[0] + 1)), int(ratio * int(ratio * (budgets[0] + 1))))
    assert counted_mean(layers, budgets, depth, count) <= keep < counted_mean(layers, more, depth, count)
    assert budgets[1:] == (int(ratio * budgets[0]), int(ratio * budgets[1]))


@pytest.mark.parametrize("keep", [250, 300, 400, 560])
def test_large_budgets_lose_less_behind_the_later_layers(keep):
    budgets = stage_budgets(keep, (1, 10, 20), 32, 576)
    assert budgets[0] == 575 and keep - 1 < counted_mean((1, 10, 20), budgets, 32, 576) <= keep


def test_192_is_what_the_shape_of_128_gives():
    assert stage_budgets(192, (1, 10, 20), 32, 576)[0] == pytest.approx(454, abs=2)


def test_stages_of_ones_own():
    shares = AdaptInfer(layers=(0, 9, 19), budgets=(0.17, 0.6, 0.3)).cuts(28, None, 100)
    assert [point.keep for point in shares] == [17, 10, 3]
    tokens = AdaptInfer(layers=(0, 2), budgets=(64, 64)).cuts(4, None, 30)
    assert [point.keep for point in tokens] == [29, 28]  # every stage drops one at least
    assert [point.keep for point in AdaptInfer().cuts(32, Budget(1.0), 576)] == [576] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"layers": (3, 1)},
        {"layers": ()},
        {"budgets": (3, 2)},
        {"budgets": (1.5, 2, 1)},
        {"budgets": (-1, 2, 1)},
        {"mix": 2.0},
    ],
)
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(SpecError):
        AdaptInfer(**options)


def test_budgets_that_cannot_be_met_are_refused():
    with pytest.raises(SpecError, match="18 already"):
        AdaptInfer().cuts(32, Budget(17), 576)
    with pytest.raises(SpecError, match="give one of them"):
        AdaptInfer().cuts(32, None, 576)
    with pytest.raises(SpecError, match="choose layers below 3"):
        AdaptInfer(layers=(3,), budgets=(4,)).cuts(4, None, 36)


@pytest.mark.parametrize("spec", ["adaptinfer@0.3", "adaptinfer(layers=(0,2),budgets=(9,0))"])
def test_a_ragged_batch_equals_the_slow_twin(spec):
    cut_equals_twin(Subject(spec, "llava"))
