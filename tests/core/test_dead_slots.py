# SPDX-License-Identifier: Apache-2.0
"""Decode steps by hand after a cut of a ragged batch, whose shorter rows hold slots that are no tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmprune.api import prune
from vlmprune.errors import InvariantError
from vlmprune.testing.checks_sequence import numbered, right_padded
from vlmprune.testing.conformance import shared_model
from vlmprune.testing.processors import PAD_ID
from vlmprune.testing.reference import kept_by_hand, logits_of
from vlmprune.testing.tiny import tiny_inputs

STEP = torch.tensor([[11], [12], [13]])  # (B, 1) a word for every row
Inputs = dict[str, Tensor]


def step_by_hand(model: Any, inputs: Inputs, maps: Any, positions: str) -> list[Tensor]:
    """(V,) logits after one more word, for every row alone."""
    rows = kept_by_hand(model, inputs, maps, positions)
    embed = model.get_input_embeddings()
    grown = [kept.grown(embed(word[None]).detach()) for kept, word in zip(rows, STEP, strict=False)]
    return [logits_of(model, kept)[-1] for kept in grown]


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_a_step_without_a_mask_does_not_see_dead_slots(masked: bool, positions: str) -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(2, 1, 0))
    with prune(model, "fastervlm@9", positions=positions) as run:
        output = model(**inputs, position_ids=numbered(inputs), use_cache=True)
        maps, mask = run.last.keep, inputs["attention_mask"]
        call = {"attention_mask": torch.cat([mask, torch.ones_like(STEP)], dim=1)} if masked else {}
        places = mask.sum(dim=1, keepdim=True)
        got = model(
            input_ids=STEP, position_ids=places, past_key_values=output.past_key_values, **call
        ).logits[:, -1]
    for row, want in enumerate(step_by_hand(model, inputs, maps, positions)):
        torch.testing.assert_close(got[row], want, rtol=0, atol=5e-5)


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_a_step_after_right_padding_sees_every_word(positions: str) -> None:
    """Padding is dropped with what is cut: columns of the mask and slots of the cache part before the end."""
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1, 1, 1))
    right = right_padded(inputs)
    assert right["attention_mask"][:, -1].tolist() == [0, 0, 1], "rows of three lengths"
    with prune(model, "fastervlm@9", positions=positions) as run:
        output = model(**right, position_ids=numbered(right), use_cache=True)
        maps = run.last.keep
        mask = torch.cat([right["attention_mask"], torch.ones_like(STEP)], dim=1)
        call = {"attention_mask": mask, "position_ids": right["attention_mask"].sum(dim=1, keepdim=True)}
        got = model(input_ids=STEP, past_key_values=output.past_key_values, **call).logits[:, -1]
    for row, want in enumerate(step_by_hand(model, inputs, maps, positions)):
        torch.testing.assert_close(got[row], want, rtol=0, atol=5e-5)


def ending_in_an_image(row: int, inputs: Inputs, image_token: int) -> Inputs:
    """The same batch without the text behind the last image of one row."""
    ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
    behind = ids.shape[1] - 1 - int((ids[row] == image_token).nonzero().max())
    ids[row], mask[row] = ids[row].roll(behind), mask[row].roll(behind)
    ids[row, :behind], mask[row, :behind] = PAD_ID, 0
    return {**inputs, "input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_columns_that_one_row_lost_cannot_be_cropped_from_any() -> None:
    model = shared_model("llava", None, None)
    whole = tiny_inputs(images=(1, 1), text_len=6)
    inputs = ending_in_an_image(0, whole, model.config.image_token_id)
    with prune(model, "uniform@9"):  # does not keep the last patch
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(InvariantError, match="were cut together"):
            cache.crop(-1)
        cache = model(**whole, use_cache=True).past_key_values
        cache.crop(-6)
        assert cache.get_seq_length() == whole["input_ids"].shape[1] - 6
