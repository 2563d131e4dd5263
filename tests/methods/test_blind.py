# SPDX-License-Identifier: Apache-2.0
"""The blind baseline: the language model reads the text alone."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from vlmprune.core.select import choose_own
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import InvariantError, SpecError
from vlmprune.methods.baselines import Blind
from vlmprune.testing.reference import dense_rows, logits_of
from vlmprune.testing.tiny import tiny_inputs, tiny_model

# [CLS] of frames in Video-LLaVA, newlines in LLaVA-NeXT, places in pictures and added features in Qwen3-VL
FAMILIES = {"llava": False, "llava_next": False, "video_llava": True, "qwen3_vl": True}


@pytest.mark.parametrize(("family", "video"), FAMILIES.items())
def test_the_answer_is_that_of_the_text(family, video):
    model, inputs = tiny_model(family), tiny_inputs(family, images=(1, 2, 0), video=video)
    config = model.config
    pictured = inputs["input_ids"] == config.image_token_id
    if video:
        pictured |= inputs["input_ids"] == config.video_token_id
    with vlmprune.prune(model, "blind") as run, torch.no_grad():
        got = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        ).logits[0]
    assert run.last is not None
    for row, dense in enumerate(dense_rows(model, inputs)):
        mask = inputs["attention_mask"][row].bool()
        text = dense.columns(~pictured[row, mask])
        if dense.positions.ndim == 2:
            text = text.recounted()
        torch.testing.assert_close(got[row], logits_of(model, text)[-1], rtol=1e-4, atol=1e-4)


def test_the_report_says_that_nothing_stayed():
    model = tiny_model("llava")
    with vlmprune.prune(model, "blind") as run, torch.no_grad():
        model(**tiny_inputs("llava", images=(1, 2)))
    assert run.last.realised_tokens == [0, 0, 0]
    assert [one.keep_idx.tolist() for one in run.last.keep] == [[], [], []]


def test_text_alone_is_left_as_it_is():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", images=(0,))
    with torch.no_grad():
        want = model(**inputs).logits
        with vlmprune.prune(model, "blind"):
            assert torch.equal(model(**inputs).logits, want)


def test_it_takes_no_budget():
    with pytest.raises(SpecError, match="budget"):
        vlmprune.parse("blind@9").build()


def test_other_methods_may_not_keep_nothing():
    tokens = VisualTokens(features=torch.ones(2, 4, 3))
    assert [len(one) for one in choose_own(Blind(), tokens)] == [0, 0]

    class Careless(Blind):
        def least(self, count):
            return 1

    with pytest.raises(InvariantError, match="keeps nothing"):
        choose_own(Careless(), tokens)
