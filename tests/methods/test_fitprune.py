# SPDX-License-Identifier: Apache-2.0
"""FitPrune against a literal transcription of its step, its schedules, and the slow twin inside a model."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlmprune.core.budget import Budget
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import SpecError
from vlmprune.hooks.attention_call import AttentionCall
from vlmprune.hooks.slots.ranking import received_by_pictures
from vlmprune.methods.fitprune import TABLES, FitPrune, self_attention
from vlmprune.testing.checks_inside import cut_equals_twin
from vlmprune.testing.conformance import Subject

PUBLISHED_MEANS = {10: 539, 20: 488, 30: 415, 40: 352, 50: 289, 55: 261, 60: 231, 70: 173, 80: 115, 90: 56}


def attention_call(batch=2, heads=3, length=50, seed=0):
    torch.manual_seed(seed)
    states = torch.randn(3, batch, heads, length, 4)
    return AttentionCall(None, *states, None, {})


def span(row, first, end):
    return SimpleNamespace(row=row, columns=torch.arange(first, end))


def test_pictures_give_attention_to_themselves_by_their_strongest_head():
    call = attention_call()
    spans = [span(0, 3, 23), span(0, 25, 45), span(1, 10, 31)]  # two pictures, and one of another size
    received = received_by_pictures(call, spans, 50)
    maps = call.attention(torch.arange(50).expand(2, -1)).amax(dim=1)  # (B, L, L)
    want = torch.zeros(2, 50)
    for one in spans:
        at = one.columns
        want[one.row, at] = maps[one.row, at][:, at].sum(dim=0)
    torch.testing.assert_close(received, want)


def test_the_smallest_products_leave():
    rng = np.random.default_rng(2)
    attention = rng.random((2, 3, 4, 20)).astype(np.float32)
    received = rng.random((2, 20)).astype(np.float32)
    tokens = VisualTokens(text_attention=torch.from_numpy(attention), lm_received=torch.from_numpy(received))
    product = attention.max(axis=1).sum(axis=1) * received / 20
    np.testing.assert_allclose(FitPrune().score(tokens).numpy(), product, rtol=1e-5)
    want = [sorted(np.argsort(-row, kind="stable")[:7].tolist()) for row in product]
    assert choose(FitPrune(), tokens, 7).tolist() == want


def test_filling_of_shorter_text_counts_for_nothing():
    torch.manual_seed(0)
    attention, received = torch.rand(1, 2, 5, 12), torch.rand(1, 12)
    filled = torch.cat([attention[:, :, -1:].expand(-1, -1, 3, -1), attention], dim=2)
    mask = torch.tensor([[False] * 3 + [True] * 5])
    alone = FitPrune().score(VisualTokens(text_attention=attention, lm_received=received))
    padded = FitPrune().score(VisualTokens(text_attention=filled, lm_received=received, query_mask=mask))
    torch.testing.assert_close(alone, padded, rtol=1e-6, atol=0)


def test_ties_keep_the_lower_index():
    flat = VisualTokens(text_attention=torch.full((1, 2, 3, 9), 0.1), lm_received=torch.ones(1, 9))
    assert choose(FitPrune(), flat, 4).tolist() == [[0, 1, 2, 3]]


def test_the_correction_divides_by_those_that_can_see_a_token():
    torch.testing.assert_close(
        self_attention(torch.tensor([[6.0, 6.0, 6.0]]), causal_correction=True),
        torch.tensor([[2.0, 3.0, 6.0]]),
    )


@pytest.mark.parametrize("percent", list(TABLES))
def test_tables_leave_the_published_means(percent):
    points = FitPrune(percent=percent).cuts(32, None, 576)
    left = [point.keep for point in points]  # what leaves layers 0 .. 30; the last layer hands on as much
    assert round(np.mean([*left, left[-1]])) == PUBLISHED_MEANS[percent]
    assert [point.layer for point in points] == list(range(1, 32))
    assert all(point.source == point.layer - 1 for point in points)


@pytest.mark.parametrize("keep", [500, 352, 231, 128, 60])
@pytest.mark.parametrize("count", [576, 729])
def test_a_budget_is_met_on_average(keep, count):
    points = FitPrune().cuts(32, Budget(keep), count)
    read = [count, *(point.keep for point in points)]
    assert abs(np.mean(read) - keep) <= 1
    assert FitPrune(final=True).cuts(32, Budget(keep), count)[-1].keep == pytest.approx(keep, abs=1)


def test_everything_is_kept_where_that_is_asked_for():
    assert {point.keep for point in FitPrune().cuts(32, Budget(1.0), 576)} == {576}


def test_budgets_that_no_schedule_meets_are_refused():
    with pytest.raises(SpecError, match="must stay above"):
        FitPrune().cuts(32, Budget(16), 576)
    with pytest.raises(SpecError, match="deletes nothing that a later layer would read"):
        FitPrune(schedule=(0, 0, 0, 5)).cuts(4, Budget(0.5), 16)


def test_small_steps_wait():
    steps = [point.keep for point in FitPrune(min_delete=8).cuts(32, None, 576)]
    drops = [a - b for a, b in zip([576, *steps[:-1]], steps, strict=True) if a != b]
    assert min(drops) >= 8 and steps[-1] - 127 < 8


def test_a_schedule_of_ones_own_is_one_of_all_its_layers():
    points = FitPrune(schedule=(100, 0, 100, 0)).cuts(4, None, 576)
    assert [point.keep for point in points] == [476, 476, 376]
    assert [point.keep for point in FitPrune(schedule=(144, 0)).cuts(4, None, 288)] == [288, 216, 216]
    with pytest.raises(SpecError, match="schedule="):
        FitPrune(schedule=(576,))


@pytest.mark.parametrize("options", [{"percent": 65}, {"min_delete": 0}])
def test_options_that_mean_nothing_are_refused(options):
    with pytest.raises(SpecError):
        FitPrune(**options)


@pytest.mark.parametrize("spec", ["fitprune(schedule=(96,160,160,0))", "fitprune@0.5"])
def test_a_ragged_batch_equals_the_slow_twin(spec):
    cut_equals_twin(Subject(spec, "llava"))
