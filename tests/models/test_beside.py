# SPDX-License-Identifier: Apache-2.0
"""What decoder layers are given of every token beside its hidden state, behind cuts between them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from available import available
from torch import Tensor

import vlmprune
from vlmprune.errors import UnsupportedError
from vlmprune.hooks.sequence.compaction import Compaction
from vlmprune.models.gemma4 import Gemma4Adapter
from vlmprune.testing.checks_generation import second_turn
from vlmprune.testing.checks_model import training_works
from vlmprune.testing.checks_sequence import batch_row_equals_alone, cut_equals_hand_built
from vlmprune.testing.conformance import Subject, generate
from vlmprune.testing.reference_inside import masked
from vlmprune.testing.tiny import tiny_inputs


def last_logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


@pytest.mark.parametrize(
    "check",
    [cut_equals_hand_built, batch_row_equals_alone, second_turn, training_works],
    ids=lambda check: check.__name__,
)
@pytest.mark.parametrize("spec", ["fastv(layer=1)@9", "pyramiddrop(layers=[1,3])@0.5"])
def test_what_stands_beside_gemma4s_tokens_follows_cuts_between_layers(spec: str, check: Any) -> None:
    available("gemma4", "gemma4_unshared")
    check(Subject(spec, "gemma4", None, "gemma4_unshared"))


def test_cuts_between_layers_behind_one_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cut is followed once, by what was left in front of it, and never in a decode step."""
    model, inputs = available("gemma4", "gemma4_unshared"), tiny_inputs("gemma4", images=(1, 2, 0))
    seen: list[tuple[int, int]] = []
    for layer in model.model.language_model.layers:
        monkeypatch.setattr(
            layer,
            "forward",
            lambda hidden, *beside, _own=layer.forward, **kwargs: (
                # a layer that is only asked for its attention is given none
                seen.extend((hidden.shape[1], one.shape[1]) for one in beside)
                or _own(hidden, *beside, **kwargs)
            ),
        )
    with vlmprune.prune(model, "random@20+pyramiddrop(layers=[1,3])@0.5") as run:
        generate(model, inputs, max_new_tokens=3)
    widths = [n for n, _ in seen]
    assert all(n == beside for n, beside in seen)
    assert widths[0] > widths[1] == widths[2] > widths[3] and widths[4:] == [1] * 8
    assert run.last is not None


def test_twins_notice_what_stands_beside_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    available("gemma4", "gemma4_unshared")
    monkeypatch.setattr(Compaction, "along", lambda self, values: values[:, : self.width])
    with pytest.raises(AssertionError):
        cut_equals_hand_built(Subject("fastv(layer=1)@9", "gemma4", None, "gemma4_unshared"))


@pytest.mark.parametrize(
    ("names", "said"),
    [((), "layers are given.*prune before"), (("position_ids",), r"'per_layer_input' of shape")],
)
def test_what_an_adapter_does_not_name_is_refused(names: tuple[str, ...], said: str) -> None:
    class Forgets(Gemma4Adapter):
        def __init__(self, model: Any) -> None:
            super().__init__(model)
            self.beside = names

    model, inputs = available("gemma4", "gemma4_unshared"), tiny_inputs("gemma4")
    with (
        pytest.raises(UnsupportedError, match=said),
        vlmprune.prune(model, "fastv(layer=1)@9", adapter=Forgets),
    ):
        generate(model, inputs)


@pytest.mark.parametrize("spec", ["fastv(layer=1)@9", "random@20+fastv(layer=1)@9"])
def test_ernies_experts_of_pictures_follow_cuts_between_layers(spec: str) -> None:
    """The same as without a cut, but for a mask that hides what was dropped."""
    model = copy.deepcopy(available("ernie4_5_vl_moe"))
    model.set_attn_implementation("eager")
    inputs = tiny_inputs("ernie4_5_vl_moe", images=(1,))
    types = (inputs["input_ids"] == model.config.image_token_id).int()
    typed = inputs | {"moe_mm_token_type_ids": types}
    with vlmprune.prune(model, spec) as run:
        got, pruned = generate(model, typed), last_logits(model, typed)
        plain = last_logits(model, inputs)
    first, length = int(types[0].argmax()), types.shape[1]
    picture = range(first, first + 36)

    def without(chosen: Tensor) -> list[int]:
        kept = {first + number for number in chosen.tolist()}
        return [column for column in range(length) if column not in picture or column in kept]

    cuts = {1: without(run.last.keep[0].keep_idx)}
    if "+" in spec:  # drawn by the seed alone: the same tokens as in a run of its own
        with vlmprune.prune(model, "random@20") as before:
            last_logits(model, typed)
        cuts[0] = without(before.last.keep[0].keep_idx)
    with masked(model, cuts, {}) as dense:
        want, logits = generate(dense, typed), last_logits(dense, typed)
    assert torch.equal(got, want)
    torch.testing.assert_close(pruned, logits, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(pruned, plain, atol=1e-2)
