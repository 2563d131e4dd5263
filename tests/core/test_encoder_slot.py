# SPDX-License-Identifier: Apache-2.0
"""The encoder slot: a minimal method inside a real tower equals the tower's blocks called one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

import vlmprune
from vlmprune.core.encoder import EncoderBlock, Shortened
from vlmprune.core.method import Method, SlotName, What
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.hooks.vision.encode import EncodedImages
from vlmprune.models import adapter_for
from vlmprune.testing.conformance import generate
from vlmprune.testing.tiny import tiny_inputs, tiny_model, tiny_row


@dataclass(frozen=True)
class Largest(Method):
    """Behind every block but the last, drops patches below the mean norm, at the last stop those beyond k.

    The data decide how many leave, so that the crops of a batch are of different length.
    """

    slot: ClassVar[SlotName] = "encoder"

    def shortens_at(self, depth: int) -> range:
        return range(depth)

    def shorten(self, block: EncoderBlock, k: int) -> Shortened:
        norm = block.hidden.norm(dim=-1).masked_fill(~block.alive, -torch.inf)  # (T, n)
        rank = norm.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 is the largest
        if block.left == 0:
            return Shortened(rank < k)
        mean = torch.where(block.alive, norm, 0).sum(1, keepdim=True) / block.alive.sum(1, keepdim=True)
        return Shortened(((norm >= mean) | (rank < k)) & block.alive)


@dataclass(frozen=True)
class Pairs(Method):
    """Averages every second row into the one before it, once, behind the first block."""

    slot: ClassVar[SlotName] = "encoder"

    def shortens_at(self, depth: int) -> tuple[int, ...]:
        return (0,)

    def shorten(self, block: EncoderBlock, k: int) -> Shortened:
        row = torch.arange(block.count).expand(block.hidden.shape[0], -1)
        return Shortened(row % 2 == 0, row - row % 2)


def by_hand(model, method: Method, pixels: Tensor, k: int) -> tuple[Tensor, Tensor, list[int]]:
    """Rows (k, C) that the projector gets for one picture, their patches (k,), patches behind every block."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    prefix = int(hasattr(tower.embeddings, "class_embedding"))
    adapter = adapter_for(model)
    blocks = list(tower.encoder.layers)
    depth = len(blocks) + 1 + adapter.layers[0] if adapter.layers[0] < 0 else adapter.layers[0]
    hidden = tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    left, sizes = torch.arange(hidden.shape[1] - prefix), torch.ones(hidden.shape[1] - prefix)
    counts = []
    for number, block in enumerate(blocks[:depth]):
        bias = torch.cat([torch.zeros(prefix), sizes.log()]).expand(1, 1, hidden.shape[1], -1)
        hidden = block(hidden, attention_mask=bias)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        patches = hidden[0, prefix:]
        none = torch.empty(1, 1, 0, 1)
        seen = EncoderBlock(
            depth - 1 - number,
            patches[None],
            none,
            none,
            sizes[None],
            torch.ones(1, len(left), dtype=torch.bool),
        )
        if number in method.shortens_at(depth):
            answer = method.shorten(seen, k)
            keep = answer.keep[0]
            if answer.into is not None:
                groups = [answer.into[0] == row for row in range(len(left))]
                patches = torch.stack(
                    [
                        (patches[group] * sizes[group, None]).sum(0) / sizes[group].sum()
                        if group.any()
                        else row
                        for row, group in zip(patches, groups, strict=True)
                    ]
                )
                sizes = torch.stack([sizes[group].sum() for group in groups])
            left, sizes = left[keep], sizes[keep]
            hidden = torch.cat([hidden[:, :prefix], patches[keep][None]], dim=1)
        counts.append(len(left))
    if (
        adapter.layers[0] == -1
        and hasattr(tower, "post_layernorm")
        and model.config.model_type == "paligemma"
    ):
        hidden = tower.post_layernorm(hidden)
    return hidden[0, prefix:], left, counts


@pytest.mark.parametrize("family", ["llava", "paligemma"])
@pytest.mark.parametrize(("method", "k"), [(Largest(), 9), (Pairs(), 18)], ids=["drops", "averages"])
def test_the_projector_gets_what_the_blocks_give_one_by_one(family: str, method: Method, k: int) -> None:
    model, inputs = tiny_model(family), tiny_inputs(family, images=(1, 1))
    projector = adapter_for(model).projector
    got: list[Tensor] = []
    with torch.no_grad(), vlmprune.prune(model, method, keep=k) as run:
        handle = projector.register_forward_pre_hook(lambda module, args: got.append(args[0]))
        model(**inputs)
        handle.remove()
        kept = [one.keep_idx for one in run.last.keep]
    for row in range(2):
        with torch.no_grad():
            want, patches, counts = by_hand(model, method, inputs["pixel_values"][row : row + 1], k)
        assert torch.equal(kept[row], patches)
        torch.testing.assert_close(got[0][row], want, rtol=1e-4, atol=1e-5)
        assert counts[0] < 36, "nothing left behind the first block: the case is too easy"


@pytest.mark.parametrize("family", ["llava", "llava_next", "paligemma", "llava_onevision"])
def test_rows_of_a_ragged_batch_equal_each_alone(family: str) -> None:
    images = (1, 2, 0, 1)
    model, inputs = tiny_model(family), tiny_inputs(family, images=images)
    with torch.no_grad(), vlmprune.prune(model, Largest(), keep="7/crop") as run:
        ids = generate(model, inputs)
        kept = [one.keep_idx for one in run.last.keep]
        alone, kept_alone = [], []
        for row in range(len(images)):
            alone.append(generate(model, tiny_row(inputs, family, row, images))[0])
            kept_alone += [one.keep_idx for one in run.last.keep]
    assert torch.equal(ids, torch.stack(alone))
    assert all(torch.equal(one, other) for one, other in zip(kept, kept_alone, strict=True))


def test_everything_kept_is_dense_and_nothing_stays_on_the_model() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad():
        dense = model(**inputs).logits
        hooks = [len(module._forward_hooks) for module in model.modules()]  # transformers has put in its own
        with vlmprune.prune(model, "tome@1.0/crop"):
            assert torch.equal(model(**inputs).logits, dense)
        with vlmprune.prune(model, "tome@9/crop") as run:
            assert not torch.equal(model(**inputs).logits, dense)
            run.enabled = False
            assert torch.equal(model(**inputs).logits, dense)
        assert torch.equal(model(**inputs).logits, dense)
    assert hooks == [len(module._forward_hooks) for module in model.modules()]


@dataclass(frozen=True)
class Short(Largest):
    """Keeps one patch too few."""

    def shorten(self, block: EncoderBlock, k: int) -> Shortened:
        return super().shorten(block, k - 1)


@dataclass(frozen=True)
class Misshapen(Largest):
    """Answers for another number of rows."""

    def shorten(self, block: EncoderBlock, k: int) -> Shortened:
        return Shortened(block.alive[:, 1:])


@dataclass(frozen=True)
class Undeclared(Largest):
    """Reads attention that it does not ask for."""

    def shorten(self, block: EncoderBlock, k: int) -> Shortened:
        block.need("cls_attention")
        return Shortened()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (Short(), r"left \[8\] patches of 36; expected 9"),
        (Misshapen(), r"shape \(1, 35\); expected \(1, 36\)"),
        (Undeclared(), "declare it in its needs"),
    ],
    ids=["short", "misshapen", "undeclared"],
)
def test_a_wrong_answer_is_named(method: Method, said: str) -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with pytest.raises(vlmprune.VlmPruneError, match=said), vlmprune.prune(model, method, keep=9):
        model(**inputs)


def test_what_cannot_be_combined_or_asked_says_why() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with pytest.raises(UnsupportedError, match="leaves patches out of the vision tower"):
        vlmprune.prune(model, "tome@9+fastervlm@4")
    with pytest.raises(UnsupportedError, match="acts inside the vision tower"):
        vlmprune.score(model, inputs, "flowcut")
    with pytest.raises(UnsupportedError, match="needs a model that runs"):
        vlmprune.select("tome", 4, features=torch.randn(1, 9, 4))
    with pytest.raises(UnsupportedError, match="is built otherwise"):
        vlmprune.prune(tiny_model("qwen2_vl"), "tome@9")
    with pytest.raises(UnsupportedError, match="inside the vision tower"):  # features of several layers
        vlmprune.prune(tiny_model("vipllava"), "tome@9")
    with pytest.raises(UnsupportedError, match=r"has no \[CLS\] token"):
        vlmprune.prune(tiny_model("paligemma"), "flowcut@9")
    with pytest.raises(SpecError, match="has no budget"):
        vlmprune.prune(model, "tome")
    tiles = tiny_model("llava_next")
    with vlmprune.prune(tiles, "tome@9"), pytest.raises(UnsupportedError, match="'@9/crop' instead of '@9'"):
        tiles(**tiny_inputs("llava_next"))
    with pytest.raises(SpecError, match="overrides none of shorten"):

        @vlmprune.register("idle_in_the_tower")
        @dataclass(frozen=True)
        class Idle(Method):
            slot: ClassVar[SlotName] = "encoder"
            needs: ClassVar[tuple[What, ...]] = ()


def test_clips_whose_patches_are_averaged_before_the_projector_are_refused() -> None:
    model, inputs = tiny_model("llava_next_video"), tiny_inputs("llava_next_video", images=(1,), video=True)
    with (
        vlmprune.prune(model, "tome@9/crop"),
        pytest.raises(UnsupportedError, match="averages the patches of a video"),
    ):
        model(**inputs)


def test_images_that_were_encoded_without_it_cannot_be_used() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    session = vlmprune.prune(model, "tome@9")
    shared = EncodedImages([vlmprune.prune(model, "fastervlm@9")])
    images = shared.encode(inputs)
    with pytest.raises(UnsupportedError, match="encode them anew"), shared.serving(session, images):
        pass


def test_it_goes_together_with_a_cut_inside_the_language_model() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad(), vlmprune.prune(model, "tome@9+fastv(layer=1)@4") as run:
        model(**inputs)
    assert run.last.layer_tokens[0][0] == 9 and run.last.realised_tokens == [4]


def test_no_keys_of_the_tower_are_held_behind_it() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "flowcut@9/crop") as run, torch.no_grad():
        model(**inputs)
        assert run.slots["encoder"]._local.call is None
