# SPDX-License-Identifier: Apache-2.0
"""G-Prune against a literal transcription with the power of the matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.methods import gprune
from vlmprune.methods.gprune import GPrune


def features(batch=2, n=30, width=12, seed=0, spread=0.5):
    """A few clusters of tokens."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(4, width))
    x = centres[draw.integers(0, 4, (batch, n))] + spread * draw.normal(size=(batch, n, width))
    return torch.from_numpy(x * draw.uniform(0.5, 2, (batch, n, 1))).float()


def transcription(x, threshold=0.5, temperature=0.03, rounds=5):
    norm = np.linalg.norm(x, axis=1)
    cosine = (x / norm[:, None]) @ (x / norm[:, None]).T
    edge = cosine >= threshold
    weights = np.where(edge, np.exp((cosine - 1) / temperature), 0)
    a = weights / weights.sum(1, keepdims=True)
    return norm @ np.linalg.matrix_power(a, rounds) / edge.sum(1)


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_scores_and_kept_sets_follow_the_formula(spread, rounds):
    x, method = features(spread=spread), GPrune(iterations=rounds)
    score, keep = method.score(VisualTokens(features=x)), choose(method, VisualTokens(features=x), 9)
    for row in range(2):
        want = transcription(x[row].double().numpy(), rounds=rounds)
        np.testing.assert_allclose(score[row].numpy(), want, rtol=1e-4)
        assert keep[row].tolist() == sorted(np.argsort(-want, kind="stable")[:9].tolist())


def test_a_graph_made_row_by_row_in_every_round_is_the_same(monkeypatch):
    tokens = VisualTokens(features=features(spread=0.2))
    held = GPrune().score(tokens)
    monkeypatch.setattr(gprune, "_HELD", 10)
    monkeypatch.setattr(gprune, "_ROWS_AT_ONCE", 7)
    torch.testing.assert_close(GPrune().score(tokens), held, rtol=1e-5, atol=1e-6)


def test_tokens_of_their_own_win_and_copies_lose():
    x = torch.eye(8)
    x[4:] = x[4] + 0.01 * torch.eye(8)[4:]
    assert choose(GPrune(), VisualTokens(features=x[None]), 4).tolist() == [[0, 1, 2, 3]]


def test_ties_go_to_the_lower_index_and_tokens_of_zeros_go_first():
    x = torch.ones(1, 6, 3)
    x[0, 0] = 0
    assert GPrune().score(VisualTokens(features=x))[0, 0] == 0
    assert choose(GPrune(), VisualTokens(features=x), 2).tolist() == [[1, 2]]


def test_edges_are_counted_at_any_temperature():
    """In float32 their weights vanish below 0.006."""
    x = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]]])
    score = GPrune(temperature=1e-3, iterations=0).score(VisualTokens(features=x))
    torch.testing.assert_close(score, torch.tensor([[1 / 2, 1 / 3, 1 / 2]]))


def test_rows_of_a_batch_do_not_mix_and_half_precision_is_read_as_float32():
    x = features()
    both, alone = (GPrune().score(VisualTokens(features=y)) for y in (x, x[1:]))
    torch.testing.assert_close(both[1], alone[0], rtol=1e-6, atol=1e-7)
    assert GPrune().score(VisualTokens(features=x.bfloat16())).dtype == torch.float32


@pytest.mark.parametrize("options", [{"threshold": 2.0}, {"temperature": 0.0}, {"iterations": -1}])
def test_unknown_options_are_refused(options):
    with pytest.raises(SpecError, match=f"{next(iter(options))}="):
        GPrune(**options)
