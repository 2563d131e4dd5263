# SPDX-License-Identifier: Apache-2.0
"""FastV against a literal transcription of its formula, and its decoding against a model that only masks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from official_rules import fastv_keep

import vlmprune
from vlmprune.core.method import CutPoint
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, SpecError, UnsupportedError
from vlmprune.methods.fastv import FastV
from vlmprune.spec import Budget
from vlmprune.testing.checks_inside import twins
from vlmprune.testing.conformance import Subject, generate
from vlmprune.testing.reference_inside import masked
from vlmprune.testing.tiny import tiny_inputs, tiny_model

FIRST, N, LENGTH = 4, 30, 45


def rows(batch=2, heads=4, queries=3, seed=0):
    """(B, H, R, L) softmaxed rows over the whole sequence."""
    logits = np.random.default_rng(seed).normal(size=(batch, heads, queries, LENGTH))
    return (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)


def tokens(attention):
    return VisualTokens(text_attention=torch.from_numpy(attention[..., FIRST : FIRST + N]))


@pytest.mark.parametrize("k", [1, 7, 29])
def test_the_last_row_ranks_by_the_mean_over_heads(k):
    attention = rows()
    score = attention[:, :, -1, FIRST : FIRST + N].mean(axis=1)
    keep = np.stack([np.sort(np.argsort(-row, kind="stable")[:k]) for row in score])
    np.testing.assert_allclose(FastV().score(tokens(attention)).numpy(), score, rtol=1e-6)
    assert choose(FastV(), tokens(attention), k).tolist() == keep.tolist()


def test_budgets_are_nested_and_rows_independent():
    attention = rows()
    kept = [set(choose(FastV(), tokens(attention), k)[1].tolist()) for k in range(1, N + 1)]
    assert all(small < large for small, large in pairwise(kept))
    assert set(choose(FastV(), tokens(attention[1:]), 9)[0].tolist()) == kept[8]


def test_ties_go_to_the_lower_index():
    assert choose(FastV(), VisualTokens(text_attention=torch.full((1, 2, 1, 6), 0.1)), 2).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("layer", "keep", "count", "want"),
    [(2, 0.5, 576, 288), (3, 0.25, 576, 144), (2, 128, 576, 128), (2, 128, 64, 64)],
)
def test_one_cut_ranked_by_the_layer_before_it(layer, keep, count, want):
    assert FastV(layer=layer).cuts(32, Budget(keep), count) == (CutPoint(layer, want, source=layer - 1),)


def test_fractions_are_rounded_down_and_official_ones_otherwise():
    assert [fastv_keep(n, drop, "round") for n, drop in ((5, 0.5), (3, 0.5), (576, 0.778))] == [2, 2, 128]
    assert fastv_keep(576, 0.778, "truncate") == 127
    assert fastv_keep(100, 0.9, "truncate") == 9  # of 9.999999999999998
    assert Budget(0.1).count(100) == 10


@pytest.mark.parametrize("layer", [0, -1, 2.0, True])
def test_layers_nothing_attends_before_are_refused(layer):
    with pytest.raises(SpecError, match="layer="):
        FastV(layer=layer)


def test_text_attention_is_asked_for_by_name():
    with pytest.raises(CaptureError, match="'text_attention'"):
        choose(FastV(), VisualTokens(features=torch.ones(1, 4, 2)), 2)
    keep = vlmprune.select("fastv@2", text_attention=torch.tensor([[[[0.1, 0.4, 0.2, 0.3]]]]))
    assert keep.tolist() == [[1, 3]]


def test_scores_cannot_be_had_without_the_language_model():
    with pytest.raises(UnsupportedError, match="'fastv' acts inside the language model"):
        vlmprune.score(tiny_model("llava"), tiny_inputs(images=(1,)), "fastv")


def test_another_question_keeps_other_tokens():
    model, kept = tiny_model("llava"), []
    for seed in (0, 1):
        inputs = tiny_inputs(images=(1,))
        inputs["input_ids"][0, -3:] = tiny_inputs(images=(1,), seed=seed)["input_ids"][0, -3:]
        with vlmprune.prune(model, "fastv@9") as run, torch.no_grad():
            model(**inputs)
        kept.append(run.last.keep[0].keep_idx.tolist())
    assert kept[0] != kept[1]


def test_the_kept_tokens_stay_those_of_the_prompt_while_decoding():
    """The variant behind the paper's tables ranks anew for every token; a cut was made, and stays."""
    subject, inputs = Subject("fastv@9", "llava"), tiny_inputs(images=(1,))
    with subject.prune() as run:
        ids = generate(subject.model, inputs, max_new_tokens=8)[0].tolist()
        assert run.last.decode_steps == 7 and run.last.realised_tokens == [9]
    twin = twins(subject, inputs, [36], "original")[0]
    twin.logits()
    with masked(twin.model, twin.kept, twin.merged) as model:
        assert generate(model, inputs, max_new_tokens=8)[0].tolist() == ids
