# SPDX-License-Identifier: Apache-2.0
"""Methods that say themselves how many tokens stay, and methods that read two layers of the tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from vlmprune import method_info, parse, prune, register, select
from vlmprune.core.method import Counts, Method, Need, What
from vlmprune.core.select import choose, choose_own, first_to_fit, ranked
from vlmprune.core.tokens import VisualTokens
from vlmprune.errors import CaptureError, InvariantError, SpecError
from vlmprune.hooks.vision.capture import VisionCapture
from vlmprune.registry import unregister
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row


@dataclass(frozen=True)
class AboveMean(Method):
    """Keeps what is attended to more than the mean times a factor."""

    factor: float = 1.0

    needs: ClassVar[tuple[What, ...]] = ("cls_attention",)
    counts: ClassVar[Counts] = "own"

    def own(self, tokens):
        a = tokens.need("cls_attention").mean(1)
        return a > self.factor * a.mean(1, keepdim=True)


class AtLeastThree(AboveMean):
    counts: ClassVar[Counts] = "both"
    budgeted: ClassVar[bool] = True

    def score(self, tokens):
        return tokens.need("cls_attention").mean(1)

    def least(self, count):
        return 3


class MayKeepNone(AboveMean):
    def least(self, count):
        return 0


OWN = {"above_mean": AboveMean, "at_least_three": AtLeastThree, "may_keep_none": MayKeepNone}


@pytest.fixture
def registered():
    for name, cls in OWN.items():
        register(name)(cls)
    yield
    for name in OWN:
        unregister(name)


A = torch.tensor([[0.1, 0.4, 0.1, 0.3], [0.1, 0.1, 0.6, 0.1]])


def test_every_unit_keeps_its_own_tokens(registered):
    kept = choose_own(AboveMean(), VisualTokens(cls_attention=A))
    assert [one.tolist() for one in kept] == [[1, 3], [2]]
    assert select("above_mean", cls_attention=A).tolist() == [[1, 3], [2, -1]]
    assert select("at_least_three", cls_attention=A).tolist() == [[1, 3], [2, -1]]
    assert select("at_least_three@3", cls_attention=A).tolist() == [[0, 1, 3], [0, 1, 2]]


def test_a_budget_is_refused_where_the_picture_decides(registered):
    with pytest.raises(SpecError, match="picture decides how many tokens stay; drop '@9'"):
        parse("above_mean@9")
    with pytest.raises(SpecError, match="takes no budget"):
        select(AboveMean(), 9, cls_attention=A)
    assert parse("above_mean").prunes
    assert (method_info("above_mean").counts, method_info("above_mean").budgeted) == ("own", False)
    assert (method_info("at_least_three").counts, method_info("at_least_three").budgeted) == ("both", True)
    assert method_info("fastervlm").counts == "budget"
    with pytest.raises(SpecError, match="has no budget"):
        parse("fastervlm").build(require_budget=True)
    parse("at_least_three").build(require_budget=True)


def test_fewer_tokens_than_the_least_are_refused_by_number():
    with pytest.raises(SpecError, match=r"2 of 4 tokens are too few .* keep at least 3"):
        choose(AtLeastThree(), VisualTokens(cls_attention=A), 2)
    assert choose(AtLeastThree(), VisualTokens(cls_attention=A), 3).shape == (2, 3)


def test_wrong_answers_of_own_are_refused():
    tokens = VisualTokens(cls_attention=A)
    with pytest.raises(InvariantError, match=r"keeps nothing of units \[0, 1\]"):
        choose_own(AboveMean(factor=9.0), tokens)

    class Scores(AboveMean):
        def own(self, tokens):
            return tokens.need("cls_attention").mean(1)

    with pytest.raises(InvariantError, match=r"own returned torch.float32 .* expected torch.bool"):
        choose_own(Scores(), tokens)
    with pytest.raises(SpecError, match="does not override own"):
        register("no_own")(type("NoOwn", (Method,), {"counts": "both", "score": lambda self, tokens: None}))


def test_ragged_counts_in_a_model_equal_row_by_row(registered):
    model, images = tiny_model("llava"), (1, 2, 1)
    batch = tiny_inputs("llava", images=images, seed=3)
    options = {"max_new_tokens": 4, "do_sample": False}
    with prune(model, "above_mean") as run:
        together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        counts, maps = list(run.last.realised_tokens), run.last.keep
        alone = []
        for row in range(len(images)):
            one = tiny_row(batch, "llava", row, images)
            ids = model.generate(**one, **options)[0, one["input_ids"].shape[1] :]
            assert ids.tolist() == together[row].tolist()
            alone += run.last.realised_tokens
    assert counts == alone == [len(one) for one in maps] and len(set(counts)) > 1
    assert max(counts) < run.last.dense_tokens[0]


def test_two_layers_of_the_tower_are_told_apart():
    needs = (Need("received_attention"), Need("received_attention", 0.25), Need("wide_keys", -1))
    tower = tiny_model("llava").model.vision_tower
    pixels = tiny_inputs("llava")["pixel_values"]
    with torch.no_grad(), VisionCapture(tower, needs, layers=(-2,)) as record:
        tower(pixels)
    found = record.take()
    assert list(found) == list(needs)  # the first one that is named is the quantity itself
    captured = {need: found[need] if need.what == "wide_keys" else found[need][..., None] for need in needs}
    tokens = VisualTokens.of(captured, [0])
    assert torch.equal(tokens.need("received_attention"), found[needs[0]])
    assert torch.equal(tokens.need("received_attention", 0.25), found[needs[1]])
    assert not torch.equal(found[needs[0]], found[needs[1]])
    with pytest.raises(CaptureError, match="'received_attention' of layer 3"):
        tokens.need("received_attention", 3)


def test_wide_attention_and_keys_are_those_of_one_head_of_full_width():
    needs = (Need("wide_attention", -1), Need("wide_keys", -1))
    tower, given = tiny_model("llava").model.vision_tower, {}
    last = [module for name, module in tower.named_modules() if name.endswith("self_attn")][-1]
    hooks = [
        getattr(last, name).register_forward_hook(lambda _, __, out, name=name: given.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad(), VisionCapture(tower, needs, layers=(-2,)) as record:
        tower(tiny_inputs("llava")["pixel_values"])
    for hook in hooks:
        hook.remove()
    query, keys = given["q_proj"][:, 0], given["k_proj"]  # (T, C), (T, 1 + N, C)
    want = torch.softmax((keys @ query[..., None])[..., 0] / query.shape[1] ** 0.5, dim=1)[:, 1:]
    torch.testing.assert_close(record.take()[needs[0]], want)
    torch.testing.assert_close(record.take()[needs[1]], keys[:, 1:])


def test_groups_are_taken_in_order_as_long_as_they_fit():
    groups = torch.tensor([[[0, 1], [1, 2], [3, -1]]])
    for k, want in ((0, []), (1, []), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2, 3])):
        assert first_to_fit(groups, 5, k)[0].nonzero()[:, 0].tolist() == want
    assert not first_to_fit(groups[:, :0], 5, 4).any()


def test_ranked_breaks_ties_by_index():
    assert ranked(torch.tensor([[1.0, 2.0, 2.0, 0.0]])).tolist() == [[1, 2, 0, 3]]


def test_a_prompt_of_a_picture_alone_cannot_lose_all_of_it(registered):
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    inputs["input_ids"] = inputs["input_ids"][inputs["input_ids"] == model.config.image_token_id][None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with prune(model, "may_keep_none(factor=1e6)"), pytest.raises(InvariantError, match="holds nothing else"):
        model(**inputs)
