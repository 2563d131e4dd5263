# SPDX-License-Identifier: Apache-2.0
"""DyVTE with a fixed exit: no visual token behind it, in whatever mode the model runs."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from vlmprune.core.method import CutPoint
from vlmprune.errors import InvariantError, SpecError
from vlmprune.methods.dyvte import DyVTE, gate_features, gate_logits
from vlmprune.testing.checks_inside import cut_equals_twin, every_mode_equals_twin
from vlmprune.testing.conformance import Subject, generate
from vlmprune.testing.processors import PAD_ID
from vlmprune.testing.tiny import tiny_inputs, tiny_model


def test_all_tokens_leave_behind_one_layer():
    assert DyVTE(exit=15).cuts(32, None, 576) == (CutPoint(16, 0, source=None),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dyvte", "no weights of one are available; give a fixed layer"),
        ("dyvte(exit=1)@9", "drop '@9'"),
        ("dyvte(exit=3)", "choose at most 2"),
        ("dyvte(exit=-1)", "expected a decoder layer from 0 on"),
    ],
)
def test_what_cannot_run_says_so_before_it_is_attached(spec, message):
    with pytest.raises(SpecError, match=message):
        vlmprune.prune(tiny_model("llava"), spec)


def test_the_report_counts_no_token_behind_the_exit():
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1, 2))
    with vlmprune.prune(model, "dyvte(exit=1)") as run:
        generate(model, inputs)
        report = run.last
    assert report.realised_tokens == [0, 0, 0] and report.dense_tokens == [36] * 3
    assert report.tokens_per_layer == [36, 36, 0, 0]
    assert [kept.keep_idx.tolist() for kept in report.keep] == [[], [], []]
    assert run.spec == "dyvte(exit=1)" and report.pruned and "0 of 108 visual tokens" in str(report)


@pytest.mark.parametrize("exit", [0, 2])
def test_a_ragged_batch_equals_the_slow_twin(exit):
    cut_equals_twin(Subject(f"dyvte(exit={exit})", "llava"))


def test_modes_of_generate_equal_a_model_that_masks():
    modes = {
        "greedy": {},
        "no cache": {"use_cache": False},
        "static cache": {"cache_implementation": "static"},
    }
    every_mode_equals_twin(Subject("dyvte(exit=1)", "llava"), modes)


@pytest.mark.parametrize("batched", [False, True])
def test_a_prompt_of_a_picture_alone_is_refused(batched):
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    whole, pixels = inputs["input_ids"], inputs["pixel_values"]
    ids = whole[whole == model.config.image_token_id][None]
    mask = torch.ones_like(ids)
    if batched:  # beside a row with text
        padding = (whole.shape[1] - ids.shape[1], 0)
        ids = torch.cat([whole, torch.nn.functional.pad(ids, padding, value=PAD_ID)])
        mask = torch.cat([torch.ones_like(whole), torch.nn.functional.pad(mask, padding)])
        pixels = pixels.repeat(2, 1, 1, 1)
    with vlmprune.prune(model, "dyvte(exit=1)"), pytest.raises(InvariantError, match="holds nothing else"):
        model(input_ids=ids, attention_mask=mask, pixel_values=pixels)


def test_a_gate_reads_the_mean_of_the_text_and_its_last_token():
    torch.manual_seed(0)
    h, W1, W2 = torch.randn(1, 5, 4), torch.randn(6, 8), torch.randn(2, 6)
    f = torch.cat([h[0, :4].sum(dim=0) / 4, h[0, 4]])
    torch.testing.assert_close(gate_features(h)[0], f)
    hidden = W1 @ f
    gelu = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(gate_logits(f[None], W1, W2)[0], W2 @ gelu)
    with pytest.raises(SpecError, match="1 tokens of text"):
        gate_features(h[:, :1])
