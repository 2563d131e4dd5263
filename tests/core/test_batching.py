# SPDX-License-Identifier: Apache-2.0
"""Continuous batching of transformers has a cache without a length: text passes, pictures are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.testing.tiny import tiny_inputs, tiny_model

PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]


def answers(model):
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no continuous batching")
    from transformers import ContinuousBatchingConfig

    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    # few pages: by default the cache takes most of the memory
    pages = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)
    out = model.generate_batch(
        inputs=PROMPTS, generation_config=config, continuous_batching_config=pages, warmup=False
    )
    assert [one.error for one in out.values()] == [None, None]
    return sorted(list(one.generated_tokens) for one in out.values())


def alone(model):
    """The same answers by ``generate``: a batch takes half a minute to start."""
    plain = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found = [model.generate(torch.tensor([ids]), **plain)[0, len(ids) :].tolist() for ids in PROMPTS]
    return sorted(found)


@pytest.mark.parametrize("spec", ["fastv(layer=2)@9", pytest.param("fastervlm@9", marks=pytest.mark.slow)])
def test_text_passes_an_attached_session_and_the_report_says_that_nothing_was_cut(spec):
    model = tiny_model("llava")
    dense = alone(model)
    assert [len(tokens) for tokens in dense] == [4, 4]
    with vlmprune.prune(model, spec) as run:
        assert answers(model) == dense
        assert run.last is not None and run.last.dense_tokens == [] and "no images" in str(run.last)


class Pages:
    """A cache without a length."""


def test_pictures_are_refused():
    model, inputs = tiny_model("llava"), tiny_inputs("llava")
    with (
        torch.no_grad(),
        vlmprune.prune(model, "fastervlm@9"),
        pytest.raises(UnsupportedError, match="continuous batching"),
    ):
        model(**inputs, past_key_values=Pages())
