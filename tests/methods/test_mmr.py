# SPDX-License-Identifier: Apache-2.0
"""MMR against a literal transcription, around methods of several kinds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vlmprune
from vlmprune.core.method import Method, Need
from vlmprune.core.select import best_first, choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import InvariantError, SpecError
from vlmprune.methods.divprune import DivPrune
from vlmprune.methods.fastervlm import FasterVLM
from vlmprune.methods.fastv import FastV
from vlmprune.methods.hiprune import HiPrune
from vlmprune.methods.mmr import MMR, marginal_relevance, minmax, share_below
from vlmprune.methods.zooprune import ZOOPrune
from vlmprune.testing.tiny import tiny_inputs, tiny_model


@dataclass(frozen=True)
class Last(Method):
    """The later the token, the higher its score; reads the text."""

    needs: ClassVar[tuple[Need, ...]] = (Need("text_embeds", text="question"),)
    query_aware: ClassVar[bool] = True

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.arange(tokens.count).float().expand(tokens.batch, -1) * tokens.need("text_embeds").mean()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def transcription(imp, x, k, balance, parallel=1):
    """One picture, float64: importance (N,), tokens x (N, D)."""
    x = x.double() / x.double().norm(dim=-1, keepdim=True)
    cosines, picks = x @ x.T, []
    while len(picks) < k:
        value = [
            balance * float(imp[j]) - (1 - balance) * max(float(cosines[i, j]) for i in picks)
            if picks
            else float(imp[j])
            for j in range(len(x))
        ]
        rest = sorted((j for j in range(len(x)) if j not in picks), key=lambda j: (-value[j], j))
        picks += rest[: min(parallel, k - len(picks))]
    return picks


@pytest.mark.parametrize("balance", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("parallel", [1, 4])
def test_picks_follow_the_paper(balance, parallel):
    scores, x = drawn(2, 30).double(), drawn(2, 30, 8, seed=1).double()
    order = marginal_relevance(minmax(scores), x, 10, balance, parallel)
    for row in range(2):
        assert order[row].tolist() == transcription(minmax(scores)[row], x[row], 10, balance, parallel)


def test_the_balance_goes_from_the_ranking_to_distance():
    attention, x = drawn(2, 4, 30).softmax(-1), drawn(2, 30, 8, seed=1)
    given = VisualTokens(features=x, cls_attention=attention)
    plain = choose(FasterVLM(), given, 9)
    assert torch.equal(choose(MMR(FasterVLM(), balance=1.0), given, 9), plain)
    assert not torch.equal(choose(MMR(FasterVLM(), balance=0.5), given, 9), plain)


def test_copies_are_kept_after_all_others():
    x, scores = drawn(1, 6, 8).repeat(1, 2, 1), torch.ones(1, 12)
    assert marginal_relevance(scores, x, 6, 0.5)[0].sort().values.tolist() == list(range(6))
    assert sorted(marginal_relevance(scores, x, 12, 0.5)[0].tolist()) == list(range(12))


@given(st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0]), min_size=1, max_size=8), st.integers(1, 8))
@settings(deadline=None)
def test_the_lower_index_wins_ties(scores, k):
    want = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k]
    assert best_first(torch.tensor([scores]), k)[0].tolist() == want


def test_constant_scores_start_at_the_first_token():
    x = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]]])
    assert marginal_relevance(minmax(torch.full((1, 3), 4.0)), x, 2).tolist() == [[0, 2]]


def test_ranks_do_not_mind_an_outlier_and_keep_ties():
    scores = torch.tensor([[1.0, 1000.0, 2.0, 2.0, 0.0]])
    torch.testing.assert_close(share_below(scores), torch.tensor([[0.25, 1.0, 0.5, 0.5, 0.0]]))
    assert float(minmax(scores)[0, 2]) < 0.01
    torch.testing.assert_close(share_below(torch.ones(2, 1)), torch.zeros(2, 1))


def test_larger_budgets_keep_what_smaller_ones_keep_and_rows_are_alone():
    given = VisualTokens(features=drawn(2, 30, 8), cls_attention=drawn(2, 4, 30, seed=1).softmax(-1))
    method, before = MMR(FasterVLM()), set()
    assert method.nested and not MMR(FasterVLM(), parallel=2).nested
    for k in (3, 9, 20):
        keep = choose(method, given, k)
        alone = VisualTokens(features=given.features[1:], cls_attention=given.cls_attention[1:])
        assert torch.equal(choose(method, alone, k)[0], keep[1]) and before <= set(keep[1].tolist())
        before = set(keep[1].tolist())


def test_half_precision_is_compared_in_float32():
    x, scores = drawn(2, 30, 8).bfloat16(), minmax(drawn(2, 30, seed=1))
    assert torch.equal(marginal_relevance(scores, x, 9), marginal_relevance(scores, x.float(), 9))


def test_it_needs_what_the_inner_method_needs():
    method = MMR(FasterVLM(cls="mean", layer=-3))
    assert method.needs == (Need("received_attention", -3), Need("features"))
    assert MMR(ZOOPrune()).needs == tuple(map(Need, ("features", "encoder_features", "projector")))
    assert MMR(Last()).query_aware and not method.query_aware and MMR.kind() == "select"
    assert MMR(FasterVLM(anyres="spatial")).layout == "spatial"


def test_a_ranking_that_reads_the_question_can_be_wrapped():
    x, text = drawn(1, 6, 4), torch.ones(1, 2, 4)
    assert choose(MMR(Last()), VisualTokens(features=x, text_embeds=text), 1).tolist() == [[5]]
    assert choose(MMR(Last()), VisualTokens(features=x, text_embeds=-text), 1).tolist() == [[0]]


@pytest.mark.parametrize("inner", [DivPrune(), FastV()])
def test_what_gives_no_scores_before_the_language_model_cannot_be_wrapped(inner):
    with pytest.raises(SpecError, match=f"{inner.name} has none; wrap"):
        MMR(inner)


def test_specs_and_options():
    (plan,) = vlmprune.parse("mmr(balance=0.7,importance=rank)+fastervlm@9").build()
    assert plan.method == MMR(FasterVLM(), balance=0.7, importance="rank") and plan.budget.keep == 9
    for options in ({"balance": 1.5}, {"importance": "log"}, {"parallel": 0}):
        with pytest.raises(SpecError, match=next(iter(options))):
            MMR(FasterVLM(), **options)


@pytest.mark.parametrize("field", ["features", "cls_attention"])
def test_numbers_that_are_none_are_refused(field):
    given = VisualTokens(features=drawn(1, 6, 4), cls_attention=drawn(1, 2, 6).softmax(-1))
    getattr(given, field)[0, 1, 2] = torch.nan
    with pytest.raises(InvariantError, match="scores of fastervlm or features are not finite"):
        choose(MMR(FasterVLM()), given, 2)


def test_keep_all_is_dense_and_the_methods_around_it_compose():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", images=(1,))
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, "mmr+fastervlm@1.0"):
            assert torch.equal(model(**inputs).logits, dense)
        with vlmprune.prune(model, "mmr+zooprune(estimator=norm)@7") as run:
            model(**inputs)
    assert run.last.realised_tokens == [7]


def hiprune_tokens(seed=0):
    """Two pictures of 8 x 8 tokens, with what hiprune and mmr read."""
    middle, deep, x = (
        drawn(2, 64, seed=seed).abs(),
        drawn(2, 64, seed=seed + 1).abs(),
        drawn(2, 64, 16, seed=seed + 2),
    )
    inner = HiPrune(alpha=0.9)
    layers = {need: middle if need.layer else deep for need in inner.needs}
    return inner, VisualTokens(x, received_attention=deep, of_layers=layers, grids=((8, 8),))


@pytest.mark.parametrize("k", [1, 12, 30, 63])
def test_around_a_method_that_ranks_at_each_budget_it_reranks_that_order(k):
    inner, tokens = hiprune_tokens()
    alone = choose(inner, tokens, k)
    # by importance alone the set is that of the inner method; by both it is that of the transcription
    assert choose(MMR(inner, balance=1.0, importance="rank"), tokens, k).tolist() == alone.tolist()
    wrapped = MMR(inner, importance="rank")
    assert not wrapped.nested
    for row, kept in enumerate(choose(wrapped, tokens, k).tolist()):
        order = inner.ranking(tokens, k)[row]
        share = [float((order < one).sum()) / 63 for one in order]
        assert kept == sorted(transcription(share, tokens.features[row], k, 0.5))
