# SPDX-License-Identifier: Apache-2.0
"""The decode slot: minimal methods that hide visual tokens from decode steps equal a mask written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.core.method import Method, SlotName
from vlmprune.errors import UnsupportedError
from vlmprune.registry import unregister
from vlmprune.testing.conformance import generate
from vlmprune.testing.reference import dense_rows, kept_by_hand, language_model
from vlmprune.testing.tiny import tiny_inputs, tiny_model

STEPS = 5


@dataclass(frozen=True)
class Blindfold(Method):
    """Decode steps see no visual token."""

    slot: ClassVar[SlotName] = "decode"
    budgeted: ClassVar[bool] = False

    def visible(self, held: Tensor, step: int) -> Tensor:
        return torch.zeros_like(held)


@dataclass(frozen=True)
class Alternate(Method):
    """Even steps see every second visual token, odd steps the others."""

    slot: ClassVar[SlotName] = "decode"
    budgeted: ClassVar[bool] = False

    def visible(self, held: Tensor, step: int) -> Tensor:
        return held & (held.cumsum(dim=1) % 2 == step % 2)


@dataclass(frozen=True)
class Sighted(Method):
    """Hides nothing."""

    slot: ClassVar[SlotName] = "decode"
    budgeted: ClassVar[bool] = False

    def visible(self, held: Tensor, step: int) -> Tensor:
        return held


def by_hand(model, embeds: Tensor, visual: Tensor, method: Method | None) -> list[int]:
    """Greedy answer to one prompt (1, n, D), the whole sequence recomputed under a mask for every row."""
    prompt, ids = embeds.shape[1], []
    for _ in range(STEPS):
        length = embeds.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        for row in range(prompt, length) if method is not None else ():
            mask[row, :prompt] &= ~visual | method.visible(visual[None], row - prompt)[0]
        with torch.no_grad():
            output = language_model(model)(
                inputs_embeds=embeds,
                attention_mask=mask[None, None],
                position_ids=torch.arange(length)[None],
                use_cache=False,
            )
            ids.append(int(model.lm_head(output.last_hidden_state)[0, -1].argmax()))
            embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[ids[-1]]]))], dim=1)
    return ids


@pytest.mark.parametrize("method", [Blindfold(), Alternate(), Sighted()], ids=lambda method: method.name)
def test_answers_of_a_padded_batch_equal_masks_by_hand(method: Method) -> None:
    model, inputs = tiny_model(), tiny_inputs(images=(1, 2, 0))
    rows = dense_rows(model, inputs)
    with vlmprune.prune(model, method):
        ids = generate(model, inputs, max_new_tokens=STEPS)
    dense = generate(model, inputs, max_new_tokens=STEPS)
    wanted = []
    for row, (mask, one) in enumerate(zip(inputs["attention_mask"].bool(), rows, strict=True)):
        visual = inputs["input_ids"][row, mask] == model.config.image_token_id
        wanted.append(by_hand(model, one.embeds, visual, method))
    assert ids.tolist() == wanted
    assert torch.equal(ids, dense) == isinstance(method, Sighted)
    assert torch.equal(ids[2], dense[2]), "a row without pictures changed"


@pytest.fixture
def registered():
    vlmprune.register("alternate_steps")(Alternate)
    yield "alternate_steps"
    unregister("alternate_steps")


def test_it_composes_with_a_cut(registered: str) -> None:
    model, inputs = tiny_model(), tiny_inputs()
    answers = []
    for spec in ("fastervlm@9", f"fastervlm@9+{registered}"):
        with vlmprune.prune(model, spec) as run:
            answers.append(generate(model, inputs, max_new_tokens=STEPS))
            assert run.last.realised_tokens == [9]
            maps = run.last.keep
    kept = kept_by_hand(model, inputs, maps, "compact")[0]
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    visual = torch.zeros(kept.embeds.shape[1], dtype=torch.bool)
    visual[first : first + 9] = True
    assert answers[1][0].tolist() == by_hand(model, kept.embeds, visual, Alternate())
    assert not torch.equal(*answers)


def test_nothing_stays_after_detach() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    dense = generate(model, inputs)
    with vlmprune.prune(model, Blindfold()) as run:
        assert not torch.equal(generate(model, inputs), dense)
        run.enabled = False
        assert torch.equal(generate(model, inputs), dense)
    assert torch.equal(generate(model, inputs), dense)


def test_steps_are_counted_per_conversation() -> None:
    model, asked = tiny_model(), []

    @dataclass(frozen=True)
    class Counting(Sighted):
        def visible(self, held: Tensor, step: int) -> Tensor:
            asked.append(step)
            return held

    def step(cache: object, length: int) -> None:
        mask = torch.ones(1, length, dtype=torch.long)
        with torch.no_grad():
            model(input_ids=torch.tensor([[7]]), attention_mask=mask, past_key_values=cache)

    with vlmprune.prune(model, Counting()), torch.no_grad():
        inputs = tiny_inputs(images=(1,))
        length = inputs["input_ids"].shape[1]
        one, other = (model(**inputs, use_cache=True).past_key_values for _ in range(2))
        for number, cache in enumerate((one, one, other, one)):
            step(cache, length + 1 + (number, number, 0, 2)[number])
    assert asked == [0, 1, 0, 2]


@pytest.mark.parametrize("edit", ["vhr(layers=[3])", "act", "paint", "var"])
def test_edits_of_attention_do_not_go_with_what_hides_from_it(edit: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{edit.partition('(')[0]} changes the attention of decode"):
        vlmprune.prune(tiny_model(), f"{edit}+dycoke_decode")
