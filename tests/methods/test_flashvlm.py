# SPDX-License-Identifier: Apache-2.0
"""FlashVLM against a literal transcription of its score, and VisPruner where the text has no weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vlmprune.core.method import Need
from vlmprune.core.select import choose
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, SpecError, UnsupportedError
from vlmprune.methods.flashvlm import FlashVLM
from vlmprune.methods.vispruner import VisPruner


def inputs(batch=2, heads=3, n=36, width=8, words=5, seed=0, **fields):
    draw = np.random.default_rng(seed).normal
    logits, x, weight, e = (
        torch.from_numpy(draw(size=shape)).float()
        for shape in ((batch, heads, 1 + n), (batch, n, width), (width, 6), (batch, words, 6))
    )
    given = {"features": x @ weight, "encoder_features": x, "text_embeds": e}
    return VisualTokens(**given | {"cls_attention": logits.softmax(-1)[..., 1:]} | fields)


def softmax(x, axis):
    x = np.exp(x - x.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


def unit_range(v):
    return (v - v.min()) / (v.max() - v.min() + 1e-6)


def transcription(a, p, e, eta=0.5):
    """(N,) relevance and fused score of one picture, in float64."""
    p, e = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (p, e))
    similar = p @ e.T
    s = (softmax(similar / 0.05, 1) * similar).sum(1)
    s = unit_range(softmax(s / 0.01, 0) ** 2.5)
    s = unit_range(np.where(s < np.quantile(s, 0.995), 0.1 * s, s))
    a = np.maximum(unit_range(a.mean(0)), 1e-6)
    return s, unit_range(np.exp((1 - eta) * np.log(a) + eta * np.log(np.maximum(s, 1e-6))))


def numbers(tokens, row):
    given = (tokens.cls_attention, tokens.features, tokens.text_embeds)
    return [x[row].double().numpy() for x in given]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_scores_follow_the_formula(eta):
    tokens, method = inputs(), FlashVLM(eta=eta)
    relevance, fused = method.relevance(tokens), method.fused(tokens)
    for row in range(2):
        s, score = transcription(*numbers(tokens, row), eta=eta)
        np.testing.assert_allclose(relevance[row].numpy(), s, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(fused[row].numpy(), score, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("k", [2, 9, 16, 33])
def test_without_weight_of_the_text_it_is_vispruner(k):
    tokens = inputs()
    assert torch.equal(choose(FlashVLM(eta=0.0), tokens, k), choose(VisPruner(), tokens, k))
    silent = inputs(words=0)  # no word: no patch is lifted
    assert torch.equal(choose(FlashVLM(), silent, k), choose(VisPruner(), silent, k))


def test_the_patch_that_the_text_speaks_of_is_lifted():
    tokens = inputs(batch=1)
    weakest = int(tokens.cls_attention[0].mean(0).argsort()[1])
    e = tokens.features[:, weakest : weakest + 1]
    lifted = inputs(batch=1, text_embeds=e)
    assert int(FlashVLM().relevance(lifted).argmax()) == weakest
    assert weakest in FlashVLM().halves(lifted, 8)[0][0].tolist()
    assert weakest not in FlashVLM(eta=0.0).halves(lifted, 8)[0][0].tolist()


def test_words_that_are_not_real_change_nothing():
    tokens = inputs()
    e = torch.cat([tokens.text_embeds, torch.randn(2, 3, 6)], dim=1)
    mask = torch.arange(8).expand(2, -1) < 5
    padded = inputs(text_embeds=e, query_mask=mask)
    torch.testing.assert_close(FlashVLM().fused(padded), FlashVLM().fused(tokens))


def test_of_two_prompts_one_may_have_no_word():
    tokens = inputs()
    mask = torch.tensor([True, False])[:, None].expand(2, 5)
    half = inputs(query_mask=mask)
    assert choose(FlashVLM(), half, 9)[0].tolist() == choose(FlashVLM(), tokens, 9)[0].tolist()
    assert choose(FlashVLM(), half, 9)[1].tolist() == choose(VisPruner(), tokens, 9)[1].tolist()


def test_rows_of_a_batch_do_not_mix():
    tokens = inputs()
    names = ("features", "encoder_features", "text_embeds", "cls_attention")
    alone = VisualTokens(**{name: getattr(tokens, name)[1:] for name in names})
    assert choose(FlashVLM(), tokens, 9)[1].tolist() == choose(FlashVLM(), alone, 9)[0].tolist()


def test_half_precision_keeps_the_important_half():
    tokens = inputs()
    half = inputs(encoder_features=tokens.encoder_features.bfloat16())
    assert torch.equal(FlashVLM().halves(tokens, 12)[0], FlashVLM().halves(half, 12)[0])
    assert FlashVLM().fused(inputs(features=tokens.features.bfloat16())).dtype == torch.float32


def test_flat_scores_go_to_the_lower_index():
    flat = inputs(batch=1, cls_attention=torch.full((1, 2, 36), 0.02), words=0)
    assert FlashVLM().halves(flat, 8)[0].tolist() == [[0, 1, 2, 3]]


def test_needs_name_the_text():
    assert FlashVLM().needs[-1] == Need("text_embeds", text="prompt")
    assert FlashVLM(text="question").needs[-1] == Need("text_embeds", text="question")
    assert FlashVLM(cls="mean", layer=-2).needs[0] == Need("received_attention", -2)


def test_what_is_missing_or_too_large_is_named():
    with pytest.raises(CaptureError, match="'text_embeds'"):
        choose(FlashVLM(), inputs(text_embeds=None), 4)
    with pytest.raises(UnsupportedError, match="flashvlm compares all pairs"):
        FlashVLM().check_unit(5000)


@pytest.mark.parametrize("options", [{"eta": 1.5}, {"gamma": 0.0}, {"text": "x"}, {"step": 0}, {"dim": -1.0}])
def test_unknown_options_are_refused(options):
    with pytest.raises(SpecError, match=f"{next(iter(options))}="):
        FlashVLM(**options)
