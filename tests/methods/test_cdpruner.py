# SPDX-License-Identifier: Apache-2.0
"""CDPruner against determinants computed in full, and where its official code divides by zero."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import InvariantError, SpecError
from vlmprune.methods.cdpruner import CDPruner, conditional_dpp, likeness, scaled
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch=2, n=24, width=32, words=4, **others):
    return VisualTokens(
        features=drawn(batch, n, width), text_embeds=drawn(batch, words, width, seed=1), **others
    )


def relevance_of(x, t, sign=1.0):
    """(N,) of one picture, float64: tokens x (N, D), words t (m, D)."""
    alike = [
        sum(float(token @ word / token.norm() / word.norm()) for word in t.double()) / len(t)
        for token in x.double()
    ]
    s = sign * torch.tensor(alike, dtype=torch.float64)
    return (s - s.min() + 1e-6) / (s.max() - s.min())


def transcription(x, r, k):
    """k times the token that makes the determinant largest."""
    x = x.double() / x.double().norm(dim=-1, keepdim=True)
    kernel, picks = r[:, None] * (x @ x.T) * r, []
    for _ in range(k):
        rest = [j for j in range(len(x)) if j not in picks]
        volume = {j: float(torch.linalg.det(kernel[[*picks, j]][:, [*picks, j]])) for j in rest}
        picks.append(max(rest, key=lambda j: (volume[j], -j)))
    return picks


@pytest.mark.parametrize("sign", ["positive", "negative"])
@pytest.mark.parametrize("theta", [None, 0.5])
def test_picks_follow_the_paper(sign, theta):
    given, method = tokens(), CDPruner(sign=sign, theta=theta)
    order, gain = conditional_dpp(given.features, method.relevance(given), 8)
    for row in range(2):
        r = relevance_of(given.features[row], given.text_embeds[row], 1.0 if sign == "positive" else -1.0)
        torch.testing.assert_close(
            scaled(likeness(given.features, given.text_embeds) * (1 if sign == "positive" else -1))[
                row
            ].double(),
            r,
            rtol=1e-4,
            atol=1e-5,
        )
        r = r if theta is None else (r * 0.5).exp()
        assert order[row].tolist() == transcription(given.features[row], r, 8)
    assert bool((gain > 0).all()) and torch.equal(choose(method, given, 8), order.sort(1).values)


def test_the_most_relevant_token_comes_first():
    given = tokens(1)
    asked = VisualTokens(features=given.features, text_embeds=given.features[:, 7:8])
    assert choose(CDPruner(), asked, 1).tolist() == [[7]]
    assert choose(CDPruner(sign="negative"), asked, 1).tolist() != [[7]]


def test_relevance_lies_between_nothing_and_one():
    r = CDPruner().relevance(tokens())
    assert r.shape == (2, 24)
    torch.testing.assert_close(r.amax(1), torch.ones(2), rtol=0, atol=1e-4)
    assert bool((r > 0).all()) and float(r.amin()) < 1e-4


def test_equal_relevance_is_plain_diversity():
    assert torch.equal(scaled(torch.full((2, 5), 0.3)), torch.ones(2, 5))
    given, ones = tokens(words=0), torch.ones(2, 24)
    plain = conditional_dpp(given.features, ones, 9)[0].sort(1).values
    assert torch.equal(choose(CDPruner(), given, 9), plain)
    masked = tokens(query_mask=torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(choose(CDPruner(), masked, 9), plain)


def test_ragged_questions_are_chosen_for_as_they_are_alone():
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    given = tokens(query_mask=mask)
    together = choose(CDPruner(), given, 9)
    for row, words in enumerate(([0, 1, 3], [0])):
        alone = VisualTokens(
            features=given.features[row : row + 1], text_embeds=given.text_embeds[row : row + 1][:, words]
        )
        assert torch.equal(choose(CDPruner(), alone, 9)[0], together[row])


def test_a_picture_does_not_change_what_is_kept_of_another():
    given = tokens()
    louder = VisualTokens(
        features=given.features, text_embeds=torch.stack([given.text_embeds[0], given.features[1, :4]])
    )
    assert torch.equal(choose(CDPruner(), given, 9)[0], choose(CDPruner(), louder, 9)[0])


@pytest.mark.parametrize(("width", "k"), [(4, 12), (8, 20)])
def test_more_tokens_than_dimensions_are_filled_up_by_relevance(width, k):
    given = tokens(width=width)
    keep, r = choose(CDPruner(), given, k), CDPruner().relevance(given)
    for row in range(2):
        kept = set(keep[row].tolist())
        walked = set(conditional_dpp(given.features, r, width)[0][row].tolist())
        assert len(kept) == k and walked <= kept
        best = sorted(set(range(24)) - walked, key=lambda j: (-float(r[row, j]), j))
        assert kept == walked | set(best[: k - width])


def test_copies_are_never_kept_twice_and_ties_go_to_the_lower_index():
    x = drawn(1, 5, 16).repeat(1, 3, 1)
    keep = choose(CDPruner(), VisualTokens(features=x, text_embeds=drawn(1, 2, 16, seed=1)), 5)
    assert keep.tolist() == [[0, 1, 2, 3, 4]]
    flat = VisualTokens(features=torch.eye(6)[None], text_embeds=torch.ones(1, 1, 6))
    assert choose(CDPruner(), flat, 3).tolist() == [[0, 1, 2]]


def test_larger_budgets_keep_what_smaller_ones_keep_and_rows_are_alone():
    given, before = tokens(width=8), set()
    for k in (3, 9, 15):
        keep = choose(CDPruner(), given, k)
        alone = VisualTokens(features=given.features[1:], text_embeds=given.text_embeds[1:])
        assert torch.equal(choose(CDPruner(), alone, k)[0], keep[1])
        assert before <= set(keep[1].tolist())
        before = set(keep[1].tolist())


def test_half_precision_is_compared_in_float32():
    given = tokens()
    half = VisualTokens(features=given.features.bfloat16(), text_embeds=given.text_embeds.bfloat16())
    same = VisualTokens(features=half.features.float(), text_embeds=half.text_embeds.float())
    assert torch.equal(choose(CDPruner(), half, 9), choose(CDPruner(), same, 9))


@pytest.mark.parametrize("field", ["features", "text_embeds"])
def test_numbers_that_are_none_are_refused(field):
    given = tokens()
    getattr(given, field)[0, 2, 3] = torch.nan
    with pytest.raises(InvariantError, match="cdpruner: tokens or words are not finite"):
        choose(CDPruner(), given, 4)


def test_options_that_make_no_sense_are_refused():
    for options in ({"sign": "minus"}, {"theta": 1.0}, {"theta": -0.1}, {"text": "answer"}):
        with pytest.raises(SpecError, match=next(iter(options))):
            CDPruner(**options)


def test_a_question_changes_what_is_kept_in_a_model_and_keep_all_is_dense():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", images=(1,))
    kept = []
    for shift in (0, 5):
        asked = {**inputs, "input_ids": inputs["input_ids"].clone()}
        asked["input_ids"][0, -5:] = (asked["input_ids"][0, -5:] + 7 * shift) % 200 + 1
        with vlmprune.prune(model, "cdpruner@5") as run, torch.no_grad():
            model(**asked)
        kept.append(run.last.keep[0].keep_idx.tolist())
    assert kept[0] != kept[1]
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, "cdpruner@1.0"):
            assert torch.equal(model(**inputs).logits, dense)
