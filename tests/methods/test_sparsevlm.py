# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: its parts against literal transcriptions, and its budgets."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from official_rules import sparsevlm_rank_budget

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, SpecError
from vlmprune.methods.clustering import cluster_means, density_peaks
from vlmprune.methods.sparsevlm import SparseVLM
from vlmprune.methods.sparsevlm.plus import rope_weight
from vlmprune.methods.sparsevlm.recycling import cluster_count, kept_of, recycle
from vlmprune.methods.sparsevlm.schedule import published_rows
from vlmprune.spec import Budget

# --- transcriptions -------------------------------------------------------------------------------


def raters_by_hand(text, visual):
    z = np.exp(visual @ text.T - (visual @ text.T).max(1, keepdims=True))
    m = (z / z.sum(1, keepdims=True)).mean(0)
    return m > m.mean()


def scores_by_hand(a, mask):
    """(H, R, N), (R,) -> (N,)"""
    return np.mean([a[h, r] for h in range(len(a)) for r in range(len(mask)) if mask[r]], axis=0)


def plus_scores_by_hand(a, mask, queries, places, theta, heads):
    w = [
        [2 / np.sqrt(2 * len(theta)) * sum(np.cos(abs(q - p) * t) for t in theta) for p in places]
        for q in queries
    ]
    a = a / np.maximum(w, 0.01 * np.sqrt(2 * len(theta)))
    mass = a[:, mask].sum((1, 2))
    return scores_by_hand(a[np.argsort(-mass, kind="stable")[:heads]], mask)


def clusters_by_hand(x, c):
    n, d = x.shape
    dist = np.array([[np.sqrt(((p - q) ** 2).sum() / d) for q in x] for p in x])
    rho = [np.exp(-np.mean(sorted(dist[i])[:c] * np.array(sorted(dist[i])[:c]))) for i in range(n)]
    delta = [min([dist[i, j] for j in range(n) if rho[j] > rho[i]], default=dist.max()) for i in range(n)]
    centres = np.argsort(-np.array(rho) * delta, kind="stable")[:c].tolist()
    joins = [centres.index(i) if i in centres else int(np.argmin(dist[i, centres])) for i in range(n)]
    return np.stack([x[[i for i in range(n) if joins[i] == j]].mean(0) for j in range(c)])


def recycle_by_hand(x, scores, kept):
    best = np.argsort(-scores, kind="stable")
    cut = len(x) - kept
    n1 = int(0.3 * cut) + 1
    return sorted(best[:kept].tolist()), clusters_by_hand(x[best[kept : kept + n1]], int(n1 / 10) + 1)


# --- parts ----------------------------------------------------------------------------------------


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def inputs(batch=2, heads=4, raters=5, n=40, width=6, seed=0):
    mask = torch.ones(batch, raters, dtype=torch.bool)
    mask[0, : raters // 2] = False
    return VisualTokens(
        features=draw(batch, n, width, seed=seed),
        text_attention=draw(batch, heads, raters, n, seed=seed + 1).softmax(-1),
        query_mask=mask,
        query_positions=torch.arange(n + 7, n + 7 + raters).expand(batch, -1),
        positions=torch.arange(7, n + 7).expand(batch, -1),
        rotary_frequencies=100.0 ** -torch.linspace(0, 1, 4),
    )


@pytest.mark.parametrize("seed", range(5))
def test_raters_are_the_text_tokens_with_an_affinity_above_the_mean(seed):
    text, visual = draw(9, 6, seed=seed), draw(30, 6, seed=seed + 9)
    assert SparseVLM().raters(text, visual).tolist() == raters_by_hand(text.numpy(), visual.numpy()).tolist()


def test_all_text_tokens_rate_where_none_stands_out():
    visual = draw(30, 6)
    assert SparseVLM().raters(draw(1, 6), visual).tolist() == [True]
    assert SparseVLM().raters(torch.zeros(4, 6), visual).tolist() == [True] * 4


def test_scores_average_heads_and_real_raters():
    tokens = inputs()
    for scores, a, mask in zip(
        SparseVLM().score(tokens), tokens.text_attention, tokens.query_mask, strict=True
    ):
        np.testing.assert_allclose(scores, scores_by_hand(a.numpy(), mask.numpy()), rtol=1e-5)


@pytest.mark.parametrize(("heads", "used"), [(None, 2), (3, 3), (4, 4)])
def test_plus_divides_by_the_rotary_bias_and_uses_the_top_heads(heads, used):
    tokens = inputs()
    scores = SparseVLM(version="plus", heads=heads).score(tokens)
    for row in range(2):
        given = (tokens.text_attention, tokens.query_mask, tokens.query_positions, tokens.positions)
        want = plus_scores_by_hand(*(x[row].numpy() for x in given), tokens.rotary_frequencies.numpy(), used)
        np.testing.assert_allclose(scores[row], want, rtol=1e-5)


def test_the_rotary_bias_falls_from_the_root_of_the_head_width_and_turns_negative():
    theta = 10000.0 ** (-torch.arange(0, 128, 2) / 128)
    weight = rope_weight(torch.zeros(1, 1), torch.arange(4000)[None], theta)[0, 0]
    assert weight[0] == pytest.approx(128**0.5)
    assert (weight[:1706] > 0).all() and weight.min() < 0


def test_far_patches_keep_positive_scores():
    tokens = replace(inputs(), query_positions=torch.arange(3000, 3005).expand(2, -1))
    weight = rope_weight(tokens.query_positions, tokens.positions, tokens.rotary_frequencies)
    assert weight.min() < 0
    assert (SparseVLM(version="plus").score(tokens) > 0).all()


@pytest.mark.parametrize(("n", "clusters"), [(5, 1), (12, 2), (19, 2), (40, 5), (83, 9)])
def test_clusters_follow_the_transcription(n, clusters):
    x = draw(3, n, 6)
    merged = cluster_means(x, density_peaks(x, clusters).assignment, clusters)
    for got, tokens in zip(merged, x, strict=True):
        np.testing.assert_allclose(got, clusters_by_hand(tokens.numpy(), clusters), rtol=1e-6)


def test_equal_tokens_form_clusters_without_nan():
    peaks = density_peaks(torch.ones(1, 20, 4), 3)
    assert peaks.centres.tolist() == [[0, 1, 2]]
    assert torch.equal(cluster_means(torch.ones(1, 20, 4), peaks.assignment, 3), torch.ones(1, 3, 4))


@pytest.mark.parametrize("kept", [1, 2, 11, 25, 38, 39])
def test_kept_rows_come_first_and_merged_rows_have_no_place(kept):
    tokens = inputs()
    scores = SparseVLM().score(tokens)
    merged = recycle(tokens.features, scores, kept)
    for row in range(2):
        index, means = recycle_by_hand(tokens.features[row].numpy(), scores[row].numpy(), kept)
        assert merged.slots[row].tolist() == index + [-1] * len(means)
        np.testing.assert_allclose(merged.features[row, :kept], tokens.features[row, index])
        np.testing.assert_allclose(merged.features[row, kept:], means, rtol=1e-5)


def test_merge_counts_clusters_in_its_budget():
    tokens = inputs()
    merged = choose(SparseVLM(), tokens, 12)
    assert merged.features.shape == (2, 12, 6)
    assert (merged.slots == -1).sum(1).tolist() == [1, 1]  # 29 are cut, 9 of them are candidates


@pytest.mark.parametrize("method", [SparseVLM(recycle=False), SparseVLM(version="plus")])
def test_without_recycling_rows_are_only_picked(method):
    tokens = inputs()
    merged = choose(method, tokens, 12)
    best = np.sort(np.argsort(-method.score(tokens).numpy(), kind="stable")[:, :12])
    assert merged.slots.tolist() == best.tolist()
    assert torch.equal(merged.features[1], tokens.features[1, merged.slots[1]])


@pytest.mark.parametrize("n", [1, 2, 10, 37, 100, 309, 576])
def test_kept_patches_follow_from_the_number_of_rows(n):
    for kept in range(1, n):
        found = kept_of(n, kept + cluster_count(n - kept))
        assert found + cluster_count(n - found) == kept + cluster_count(n - kept)
        assert found - kept in (0, 1)  # one row more or less is merged where both splits fit


def test_a_budget_below_the_clusters_is_refused():
    with pytest.raises(SpecError, match="keep=3 of 576 tokens is too small for the 18 recycled ones"):
        kept_of(576, 3)
    # as many rows as clusters: no patch would be kept
    with pytest.raises(SpecError, match="keep=18 of 576 tokens is too small for the 18 recycled ones"):
        kept_of(576, 18)


def test_rows_of_half_precision_are_merged_in_float32():
    merged = recycle(torch.full((1, 600, 2), 0.1).bfloat16(), torch.zeros(1, 600), 3)
    assert merged.features.dtype == torch.bfloat16
    assert merged.features[0, 3:].unique().tolist() == torch.tensor([0.1]).bfloat16().tolist()


def test_the_rank_rule_scales_the_rank():
    block = torch.outer(torch.ones(5), torch.rand(64)) + torch.outer(torch.arange(5.0), torch.rand(64))
    assert sparsevlm_rank_budget(block, 9, 6) == (2, 24)
    assert sparsevlm_rank_budget(block, 40) == (2, 63)


# --- budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "recycled", "plain"),
    [
        (192, (309, 204, 113), (300, 200, 118)),
        (128, (312, 117, 39), (238, 108, 60)),
        (96, (249, 55, 27), (246, 54, 28)),
        (64, (82, 32, 18), (66, 34, 20)),
        (576, (576, 576, 576), (576, 576, 576)),
    ],
)
def test_published_budgets(keep, recycled, plain):
    for method, rows in (
        (SparseVLM(), recycled),
        (SparseVLM(version="plus"), plain),
        (SparseVLM(recycle=False), plain),
    ):
        stages = method.cuts(32, Budget(keep), 576)
        assert [(s.layer, s.source) for s in stages] == [(3, 2), (7, 6), (16, 15)]
        assert tuple(s.keep for s in stages) == rows
        lengths = (
            [576] * 2 + [rows[0]] * 4 + [rows[1]] * 9 + [rows[2]] * 17
        )  # the layers that rank count as cut
        assert np.mean(lengths) == pytest.approx(keep, abs=1)


@pytest.mark.parametrize("keep", [40, 50, 80, 112, 160, 240, 400])
@pytest.mark.parametrize("version", ["v1.5", "plus"])
def test_budgets_between_published_ones_have_the_mean_they_name(keep, version):
    first, second, third = (s.keep for s in SparseVLM(version=version).cuts(32, Budget(keep), 576))
    assert (2 * 576 + 4 * first + 9 * second + 17 * third) / 32 == pytest.approx(keep, abs=2.5)


def test_budgets_scale_with_the_patches():
    by_share = SparseVLM(version="plus").cuts(32, Budget(1 / 3), 2880)
    assert (
        [s.keep for s in by_share]
        == [s.keep for s in SparseVLM(version="plus").cuts(32, Budget(960), 2880)]
        == [1500, 1000, 590]
    )


def test_every_budget_gives_shrinking_stages():
    for keep in range(40, 577):
        rows = [s.keep for s in SparseVLM().cuts(32, Budget(keep), 576)]
        assert rows == sorted(rows, reverse=True)
        assert all(kept_of(n, k) >= 1 for n, k in pairwise([576, *rows]) if k < n)


@pytest.mark.parametrize(
    ("depth", "layers"),
    [(80, (2, 6, 15)), (40, (2, 6, 15)), (32, (2, 6, 15)), (28, (2, 5, 13)), (16, (1, 3, 8)), (4, (0, 1, 2))],
)
def test_layers_scale_to_shallow_models(depth, layers):
    half = Budget(0.6)
    assert tuple(point.source for point in SparseVLM().cuts(depth, half, 576)) == layers


@pytest.mark.parametrize(
    ("method", "depth", "budget", "message"),
    [
        (SparseVLM(), 32, None, "needs a budget"),
        (SparseVLM(), 3, Budget(192), "layers=.* the language model has layers 0..2"),
        (SparseVLM(layers=(2, 6, 31)), 32, Budget(192), "has layers 0..31"),
        (SparseVLM(), 32, Budget(36), "asks for 0.062 of the tokens on average, but 0.0625 is"),
    ],
)
def test_what_cannot_be_met_is_refused(method, depth, budget, message):
    with pytest.raises(SpecError, match=message):
        method.cuts(depth, budget, 576)


@pytest.mark.parametrize(
    "options",
    [
        {"version": "v2"},
        {"layers": (2, 6)},
        {"layers": (6, 2, 15)},
        {"layers": (-1, 2, 15)},
        {"heads": 14},
        {"version": "plus", "heads": 0},
    ],
)
def test_options_without_meaning_are_refused(options):
    with pytest.raises(SpecError, match=f"{list(options)[-1]}="):
        SparseVLM(**options)


def test_more_heads_than_the_model_has_are_refused():
    with pytest.raises(SpecError, match="heads=14 but the language model has 4"):
        SparseVLM(version="plus", heads=14).score(inputs())


def test_plus_needs_positions():
    with pytest.raises(CaptureError, match="rotary_frequencies"):
        SparseVLM(version="plus").score(VisualTokens(text_attention=inputs().text_attention))


def test_positions_follow_the_version():
    assert (SparseVLM().positions, SparseVLM(version="plus").positions, SparseVLM.positions) == (
        "compact",
        "original",
        "compact",
    )


def test_published_rows_meet_at_the_published_budgets():
    assert published_rows(128.0, True) == (303, 110, 36)
    assert published_rows(112.0, True) == (270.5, 79, 31)
