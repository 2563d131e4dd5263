# SPDX-License-Identifier: Apache-2.0
"""MMTok against a literal transcription of its greedy loop, with and without words and padding."""

from __future__ import annotations

import math

import pytest
import torch

import vlmprune
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import InvariantError, SpecError, UnsupportedError
from vlmprune.methods.mmtok import MMTok
from vlmprune.methods.pairs import LARGEST
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(batch=2, n=20, words=4, **others):
    return VisualTokens(
        features=drawn(batch, n, 16),
        encoder_features=drawn(batch, n, 12, seed=1),
        text_embeds=drawn(batch, words, 16, seed=2),
        **others,
    )


def rows_of(given, index, words=None):
    """Unit ``index`` alone, or with some of its words only."""
    text = given.text_embeds[index : index + 1]
    return VisualTokens(
        features=given.features[index : index + 1],
        encoder_features=given.encoder_features[index : index + 1],
        text_embeds=text if words is None else text[:, words],
    )


def softmax(row):
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def transcription(x, e, t, k, alpha=0.5, tau_t=0.02, tau_v=0.2):
    """One picture, float64: tokens x (N, D), patches e (N, C), words t (m, D)."""
    x, e, t = (one.double() / one.double().norm(dim=-1, keepdim=True) for one in (x, e, t))
    n, m = len(x), len(t)
    cover = [[p / m for p in softmax([float(word @ token) / tau_t for token in x])] for word in t]
    cover += [[alpha * q / n for q in softmax([float(one @ other) / tau_v for other in e])] for one in e]
    best, picks = [0.0] * len(cover), []
    for _ in range(k):
        gain = [sum(max(0.0, row[j] - held) for row, held in zip(cover, best, strict=True)) for j in range(n)]
        picks.append(max((j for j in range(n) if j not in picks), key=lambda j: (gain[j], -j)))
        best = [max(held, row[picks[-1]]) for row, held in zip(cover, best, strict=True)]
    return picks


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 2.0}, {"text_temperature": 0.5, "vision_temperature": 0.05}]
)
def test_picks_follow_the_paper(options):
    given, method = tokens(), MMTok(**options)
    order, gain = method.walk(method.cover(given), 9)
    names = {"alpha": "alpha", "text_temperature": "tau_t", "vision_temperature": "tau_v"}
    for row in range(2):
        tensors = given.features[row], given.encoder_features[row], given.text_embeds[row]
        assert order[row].tolist() == transcription(
            *tensors, 9, **{names[name]: value for name, value in options.items()}
        )
    assert bool((gain > 0).all()) and torch.equal(choose(method, given, 9), order.sort(1).values)


def test_the_question_counts():
    given = tokens(1)
    other = VisualTokens(
        features=given.features,
        encoder_features=given.encoder_features,
        text_embeds=given.features[:, [5, 11]],  # words that are like these tokens
    )
    assert {5, 11} <= set(choose(MMTok(), other, 3)[0].tolist())
    assert choose(MMTok(), other, 3).tolist() != choose(MMTok(), given, 3).tolist()


def test_ragged_questions_are_chosen_for_as_they_are_alone():
    mask = torch.tensor([[True, True, False, True], [True, False, False, False]])
    given = tokens(query_mask=mask)
    together = choose(MMTok(), given, 7)
    for row, words in enumerate(([0, 1, 3], [0])):
        assert torch.equal(choose(MMTok(), rows_of(given, row, words), 7)[0], together[row])
    spoilt = given.text_embeds.masked_fill(
        ~mask[..., None], 9e9
    )  # what stands in for a missing word is no matter
    again = VisualTokens(
        features=given.features, encoder_features=given.encoder_features, text_embeds=spoilt, query_mask=mask
    )
    assert torch.equal(choose(MMTok(), again, 7), together)


def test_without_words_the_picture_alone_is_covered():
    given = tokens(words=0)
    method = MMTok()
    cover = method.cover(given)
    assert cover.shape == (2, 20, 20)
    masked = tokens(query_mask=torch.zeros(2, 4, dtype=torch.bool))
    assert torch.equal(choose(method, given, 6), choose(method, masked, 6))


def test_larger_budgets_keep_what_smaller_ones_keep_and_rows_are_alone():
    given, before = tokens(), set()
    for k in (3, 9, 15):
        keep = choose(MMTok(), given, k)
        assert torch.equal(choose(MMTok(), rows_of(given, 1), k)[0], keep[1])
        assert before <= set(keep[1].tolist())
        before = set(keep[1].tolist())


def test_half_precision_is_compared_in_float32():
    given = tokens()
    names = ("features", "encoder_features", "text_embeds")
    half = VisualTokens(**{name: getattr(given, name).bfloat16() for name in names})
    same = VisualTokens(**{name: getattr(half, name).float() for name in names})
    assert torch.equal(choose(MMTok(), half, 9), choose(MMTok(), same, 9))


def test_padding_is_chosen_when_nothing_else_is_left():
    given = tokens(1, n=16, grids=((4, 4),))
    method = MMTok(pad="integer", image_size=(400, 200))  # rows 0 and 3 are padding
    assert method.excluded(given).nonzero()[:, 0].tolist() == [*range(4), *range(12, 16)]
    for k in (3, 8):
        assert set(choose(method, given, k)[0].tolist()) <= set(range(4, 12))
    assert set(choose(method, given, 11)[0].tolist()) >= set(range(4, 12))
    with pytest.raises(UnsupportedError, match="padded to one square"):
        choose(method, tokens(1, n=16, grids=((2, 8),)), 3)


@pytest.mark.parametrize("field", ["features", "encoder_features", "text_embeds"])
def test_numbers_that_are_none_are_refused(field):
    given = tokens()
    getattr(given, field)[0, 2, 3] = torch.nan
    with pytest.raises(InvariantError, match="mmtok: tokens or words are not finite"):
        choose(MMTok(), given, 4)


def test_options_and_units_that_make_no_sense_are_refused():
    bad = ({"alpha": -1.0}, {"text_temperature": 0.0}, {"vision_temperature": math.nan}, {"text": "answer"})
    bad += ({"pad": "integer"}, {"image_size": (4, 4)}, {"pad": "area", "image_size": (0, 4)})
    for options in bad:
        with pytest.raises(SpecError, match=next(iter(options))):
            MMTok(**options)
    with pytest.raises(UnsupportedError, match=f"mmtok .* at most {LARGEST}"):
        MMTok().check_unit(LARGEST + 1)


def test_specs_say_what_is_read():
    for spec, text in (("mmtok@9", "question"), ("mmtok(text=prompt,pad=none)@9", "prompt")):
        (plan,) = vlmprune.parse(spec).build()
        assert [need.text for need in plan.method.needs if need.what == "text_embeds"] == [text]


def test_a_question_changes_what_is_kept_in_a_model_and_keep_all_is_dense():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", images=(1,))
    kept = []
    for shift in (0, 5):
        asked = {**inputs, "input_ids": inputs["input_ids"].clone()}
        asked["input_ids"][0, -5:] = (asked["input_ids"][0, -5:] + 7 * shift) % 200 + 1
        with vlmprune.prune(model, "mmtok@5") as run, torch.no_grad():
            model(**asked)
        kept.append(run.last.keep[0].keep_idx.tolist())
    assert kept[0] != kept[1]
    with torch.no_grad():
        dense = model(**inputs).logits
        with vlmprune.prune(model, "mmtok@1.0"):
            assert torch.equal(model(**inputs).logits, dense)
