# SPDX-License-Identifier: Apache-2.0
"""TextMonkey's filter against a literal transcription of its steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.methods import textmonkey
from vlmprune.methods.textmonkey import TextMonkey


def features(batch=2, n=30, width=6, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(batch, n, width))).float()


def transcription(x, compare):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine, n = unit @ unit.T, len(x)
    hidden = np.tril(np.ones((n, n), bool)) if compare == "later" else np.eye(n, dtype=bool)
    return np.where(hidden, -1.0, cosine).max(1)


@pytest.mark.parametrize("compare", ["later", "all"])
@pytest.mark.parametrize("k", [1, 9, 29])
def test_scores_and_kept_sets_follow_the_steps(compare, k, monkeypatch):
    monkeypatch.setattr(textmonkey, "_ROWS_AT_ONCE", 7)
    tokens = VisualTokens(features=features())
    score, keep = TextMonkey(compare).score(tokens), choose(TextMonkey(compare), tokens, k)
    for row in range(2):
        e = transcription(tokens.features[row].double().numpy(), compare)
        np.testing.assert_allclose(-score[row].numpy(), e, atol=1e-6)
        assert keep[row].tolist() == sorted(np.argsort(e, kind="stable")[:k].tolist())


def test_of_copies_the_last_is_kept():
    x = torch.eye(4)[[0, 1, 0, 2, 1, 0]][None]
    assert choose(TextMonkey(), VisualTokens(features=x), 3).tolist() == [[3, 4, 5]]


def test_the_last_token_is_always_kept_and_ties_go_to_the_lower_index():
    tokens = VisualTokens(features=torch.eye(6)[None])
    assert choose(TextMonkey(), tokens, 1).tolist() == [[5]]
    assert choose(TextMonkey(), tokens, 3).tolist() == [[0, 1, 5]]


def test_tokens_of_zeros_are_like_nothing():
    x = features(batch=1, n=5)
    x[0, 1] = 0
    assert TextMonkey().score(VisualTokens(features=x))[0, 1] == 0


def test_rows_of_a_batch_do_not_mix_and_half_precision_is_read_as_float32():
    x = features()
    both, alone = (TextMonkey().score(VisualTokens(features=y)) for y in (x, x[1:]))
    torch.testing.assert_close(both[1], alone[0])
    assert TextMonkey().score(VisualTokens(features=x.bfloat16())).dtype == torch.float32


def test_unknown_options_are_refused():
    with pytest.raises(SpecError, match="compare="):
        TextMonkey("earlier")
