# SPDX-License-Identifier: Apache-2.0
"""Frames that arrive over several turns on a kept cache: those of each turn are a clip of their own."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.hooks.sequence.cache import cache_name
from vlmprune.testing.conformance import generate, shared_model
from vlmprune.testing.reference import greedy, kept_by_hand
from vlmprune.testing.tiny import tiny_inputs

NEW, TURNS = 3, 3
Inputs = dict[str, Tensor]
# family, and whether its frames are images
KINDS = [("llava", True), ("llava_onevision", False), ("llava_next_video", False)]


def arriving(family: str, apart: bool, turn: int) -> Inputs:
    if apart:
        return tiny_inputs(family, images=(2,), seed=turn)
    return tiny_inputs(family, images=(0,), video=True, frames=2, seed=turn)


def told(before: Inputs, answer: Tensor, now: Inputs) -> Inputs:
    """The dialogue so far as one prompt."""
    ids = torch.cat([before["input_ids"], answer, now["input_ids"]], dim=1)
    pixels = {name: torch.cat([before[name], now[name]]) for name in now if name.startswith("pixel")}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}


def stream(model: Any, family: str, apart: bool, spec: str) -> tuple[Inputs, list[Tensor], list[Any]]:
    """The whole dialogue, the answer of every turn, and what was kept in each."""
    answers: list[Tensor] = []
    maps: list[Any] = []
    dialogue, cache = arriving(family, apart, 0), None
    with vlmprune.prune(model, spec, frames=apart) as run:
        for turn in range(TURNS):
            now = arriving(family, apart, turn)
            if turn:
                dialogue = told(dialogue, answers[-1], now)
                now |= {name: dialogue[name] for name in ("input_ids", "attention_mask")}
            kept = {} if cache is None else {cache_name(inspect.signature(model.forward).parameters): cache}
            made = model.generate(
                **now, **kept, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True
            )
            answers.append(made.sequences[:, dialogue["input_ids"].shape[1] :])
            cache = made.past_key_values
            maps.append(run.last.keep)
    return dialogue, answers, maps


@pytest.mark.parametrize(("family", "apart"), KINDS)
def test_frames_that_arrive_later_are_cut_as_a_clip_of_their_own(family: str, apart: bool) -> None:
    model = shared_model(family, None, None)
    dialogue, answers, _ = stream(model, family, apart, "dense")
    if not torch.equal(answers[-1], generate(model, dialogue, max_new_tokens=NEW)):
        pytest.skip("this transformers drops the frames of later turns on a kept cache, also without pruning")
    dialogue, answers, maps = stream(model, family, apart, "evs@0.75")
    for turn, kept in enumerate(maps):
        alone = arriving(family, apart, turn)
        with vlmprune.prune(model, "evs@0.75", frames=apart) as run:
            generate(model, alone, max_new_tokens=1)
        assert [one.keep_idx.tolist() for one in kept] == [one.keep_idx.tolist() for one in run.last.keep]
        assert len(kept[0]) == kept[0].total > len(kept[1])  # the first frame of a turn has none before it
    whole = kept_by_hand(model, dialogue, [one for kept in maps for one in kept], run.positions)[0]
    assert answers[-1][0].tolist() == greedy(model, whole, NEW)
