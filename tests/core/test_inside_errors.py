# SPDX-License-Identifier: Apache-2.0
"""What cuts inside the language model refuse, and that the model stays as it was."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from vlmprune.errors import InvariantError, SpecError, UnsupportedError
from vlmprune.testing.checks_model import snapshot
from vlmprune.testing.conformance import shared_model
from vlmprune.testing.tiny import tiny_inputs, tiny_model


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("fastv(layer=4)@9", SpecError, r"layer=4 but the language model has layers 0\.\.3"),
        ("fastv", SpecError, "fastv needs a budget"),
        ("fastv@9/crop", UnsupportedError, "per image: write '@9' instead of '@9/crop'"),
        ("fastv@9/total", UnsupportedError, "per image: write '@9'"),
        (
            "pyramiddrop(layers=[1,4])@0.5",
            SpecError,
            r"layers=\(1, 4\) but the language model has layers 0\.\.3",
        ),
        ("pyramiddrop@0.25", SpecError, r"layers 0\.\.0 of 4 read all of them"),
        ("pyramiddrop(shares=[0.5,0.2,0.1])@0.5", SpecError, "set the budget already"),
    ],
)
def test_what_cannot_be_scheduled_is_refused_when_attached_and_changes_nothing(spec, error, match):
    model = shared_model("llava", None, None)
    before = snapshot(model)
    with pytest.raises(error, match=match):
        vlmprune.attach(model, spec)
    assert snapshot(model) == before


def test_strict_refuses_a_budget_beyond_the_picture():
    model = shared_model("llava", None, None)
    with (
        vlmprune.prune(model, "fastv@37", strict=True),
        pytest.raises(InvariantError, match=r"keep=37 .* picture holds 36"),
    ):
        model(**tiny_inputs(images=(1,)))


def test_gradient_checkpointing_is_refused_before_and_after_attaching():
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    model.train()
    run = vlmprune.attach(model, "fastv@9")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(
        UnsupportedError, match="fastv cuts inside the language model, which gradient checkpointing"
    ):
        model(**inputs)
    run.detach()
    with pytest.raises(UnsupportedError, match="divprune@64"):
        vlmprune.attach(model, "fastv@9")
    model.eval()  # nothing is recomputed here
    with vlmprune.prune(model, "fastv@9") as run, torch.no_grad():
        model(**inputs)
    assert run.last.realised_tokens == [9]
