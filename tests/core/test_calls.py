# SPDX-License-Identifier: Apache-2.0
"""One forward in all its forms: masks, embeddings, logits, losses, gradients, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import vlmprune
from vlmprune.errors import CaptureError, InvariantError, UnsupportedError, VlmPruneError
from vlmprune.hooks.sequence.views import Views
from vlmprune.testing.checks_sequence import numbered
from vlmprune.testing.conformance import RAGGED, generate, shared_model
from vlmprune.testing.reference import kept_by_hand, merged_embeddings
from vlmprune.testing.tiny import LLAVA_FAMILIES, tiny_inputs, tiny_model

# the others place tokens by their ids, or have a tower of another make: their conformance is a matter of
# test_conformance.py
FROM_EMBEDDINGS = LLAVA_FAMILIES


def square(inputs: dict[str, Tensor]) -> Tensor:
    length = inputs["input_ids"].shape[1]
    return torch.ones(1, 1, length, length, dtype=torch.bool).tril()


MASKS = [
    (
        "four axes",
        square,
        UnsupportedError,
        r"\(1, 1, 47, 47\); with pruned images pass the 2-D padding mask",
    ),
    ("dict", lambda inputs: {"full_attention": square(inputs)}, UnsupportedError, "attention_mask is dict"),
    (
        "too long",
        lambda inputs: torch.ones(1, 48),
        InvariantError,
        r"expected \(1, 47\): 0 tokens seen before and 47 fed now",
    ),
    ("too short", lambda inputs: torch.ones(1, 46), InvariantError, r"expected \(1, 47\)"),
    ("no token", lambda inputs: torch.zeros(1, 47), InvariantError, "hides 36 of 36 placeholder tokens"),
    (
        "a part of the picture",
        lambda inputs: torch.ones(1, 47).index_fill(1, torch.arange(6, 10), 0),
        InvariantError,
        "hides 4 of 36 placeholder tokens of pictures in .* expected 1 for all of them",
    ),
    ("other batch", lambda inputs: torch.ones(2, 47), InvariantError, r"expected \(1, 47\)"),
]


@pytest.mark.parametrize(
    ("make", "error", "message"), [pytest.param(*case[1:], id=case[0]) for case in MASKS]
)
def test_masks_that_cannot_be_cut_are_refused(make: Any, error: type[VlmPruneError], message: str) -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "fastervlm@9"), torch.no_grad():
        want = model(**inputs).logits
        with pytest.raises(error, match=message):
            model(**{**inputs, "attention_mask": make(inputs)})
        assert torch.equal(model(**inputs).logits, want), "the call after the error differs"


def test_masked_pictures_are_refused_in_every_row_of_a_batch() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1, 1))
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, (inputs["input_ids"][1] == model.config.image_token_id).nonzero()[-3:, 0]] = 0
    for spec in ("fastervlm@9", "fastv(layer=2)@9"):
        with (
            vlmprune.prune(model, spec),
            pytest.raises(InvariantError, match=r"hides 3 of 72 .* leave it out"),
        ):
            model(**{**inputs, "attention_mask": mask})


@torch.no_grad()
def test_a_mask_of_four_axes_is_fine_where_nothing_is_cut() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(0,))
    call = {"input_ids": inputs["input_ids"], "attention_mask": square(inputs)}
    with vlmprune.prune(model, "fastervlm@9"):
        pruned = model(**call).logits
    assert torch.equal(pruned, model(**call).logits)


@torch.no_grad()
def test_masks_of_any_dtype_and_no_mask_mean_the_same() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "fastervlm@9"):
        want = model(**inputs).logits
        for mask in (None, inputs["attention_mask"].bool(), inputs["attention_mask"].float()):
            assert torch.equal(model(**{**inputs, "attention_mask": mask}).logits, want)


@torch.no_grad()
def test_positional_arguments_are_understood() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "fastervlm@9"):
        want = model.model(**inputs).last_hidden_state
        got = model.model(
            inputs["input_ids"], inputs["pixel_values"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state
    assert torch.equal(got, want)


@torch.no_grad()
def test_another_feature_layer_in_the_call_is_refused() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "fastervlm@9"):
        want = model(**inputs).logits
        with pytest.raises(
            UnsupportedError, match="vision_feature_layer=-1 in the call but -2 in the config"
        ):
            model(**inputs, vision_feature_layer=-1)
        assert torch.equal(model(**inputs, vision_feature_layer=-2).logits, want)


def test_pixels_of_size_zero_are_refused() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    for shape in ((0, 3, 84, 84), (1, 3, 0, 84)):
        with vlmprune.prune(model, "fastervlm@9"), pytest.raises(CaptureError, match="size zero"):
            model(**{**inputs, "pixel_values": torch.empty(shape)})


@pytest.mark.parametrize("family", FROM_EMBEDDINGS)
@torch.no_grad()
def test_embeddings_with_pixels_equal_ids_with_pixels(family: str) -> None:
    model, inputs = shared_model(family, None, None), tiny_inputs(family, images=RAGGED)
    call = {name: value for name, value in inputs.items() if name != "input_ids"}
    with vlmprune.prune(model, "random@9"):
        want = model(**inputs).logits
        assert torch.equal(
            model(**call, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"])).logits, want
        )


@torch.no_grad()
def test_merged_embeddings_pass_through() -> None:
    """Without pixels nobody can tell where the images are."""
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1, 2))
    call = {"inputs_embeds": merged_embeddings(model, inputs), "attention_mask": inputs["attention_mask"]}
    dense = model(**call).logits
    with vlmprune.prune(model, "fastervlm@9") as run:
        assert torch.equal(model(**call).logits, dense) and run.last.note == "no images in this call"


@torch.no_grad()
def test_tuples_hold_what_the_output_holds() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    with vlmprune.prune(model, "fastervlm@9"):
        output, listed = model(**inputs), model(**inputs, return_dict=False)
        assert torch.equal(listed[0], output.logits)
        assert torch.equal(
            model.model(**inputs, return_dict=False)[0], model.model(**inputs).last_hidden_state
        )


@torch.no_grad()
def test_logits_to_keep_counts_columns_of_the_full_sequence() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=RAGGED)
    with vlmprune.prune(model, "fastervlm@9"):
        full = model(**inputs).logits
        for keep in (1, 3, 20):
            assert torch.equal(model(**inputs, logits_to_keep=keep).logits, full[:, -keep:])
        picked = torch.tensor([0, 5, 46])
        assert torch.equal(model(**inputs, logits_to_keep=picked).logits, full[:, picked])


@torch.no_grad()
def test_where_the_last_column_alone_is_read_nothing_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    length, expanded = inputs["input_ids"].shape[1], []
    expand = Views.expand
    monkeypatch.setattr(Views, "expand", lambda self, *args: expanded.append(1) or expand(self, *args))
    with vlmprune.prune(model, "fastervlm@9") as run:
        full = model(**inputs).logits
        assert full.shape[1] == length and len(expanded) == 1
        torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, full[:, -1:])
        assert len(expanded) == 1
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert len(expanded) == 1
        every = model(**inputs, logits_to_keep=1, output_hidden_states=True).hidden_states
        assert {one.shape[1] for one in every} == {length}
        # what was asked of a call that never got to its forward is not asked of another one
        run._note_logits(model, (), {"input_ids": inputs["input_ids"].clone(), "logits_to_keep": 1})
        assert model.model(**inputs).last_hidden_state.shape[1] == length


@pytest.mark.parametrize("spec", ["fastervlm@9", "pyramiddrop"])
@torch.no_grad()
def test_positions_given_to_generate_are_not_counted(spec: str) -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,))
    places = 3 * torch.arange(inputs["input_ids"].shape[1])[None]
    words = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with vlmprune.prune(model, spec):
        first, second = model.generate(**inputs, position_ids=places, **words).logits
        output = model(**inputs, position_ids=places, use_cache=True)
        torch.testing.assert_close(first, output.logits[:, -1])
        word, mask = first.argmax(-1, keepdim=True), inputs["attention_mask"]
        call = {"attention_mask": torch.cat([mask, mask[:, :1]], dim=1), "position_ids": places[:, -1:] + 1}
        step = model(input_ids=word, past_key_values=output.past_key_values, **call)
        torch.testing.assert_close(second, step.logits[:, -1])


@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.no_grad()
def test_hidden_states_of_every_layer_are_those_of_the_last_kept_token_at_or_before_a_column(
    positions: str,
) -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=RAGGED)
    with vlmprune.prune(model, "random@9", positions=positions) as run:
        found = model(**inputs, position_ids=numbered(inputs), output_hidden_states=True).hidden_states
    original = kept_by_hand(
        model, inputs, run.last.keep, "original"
    )  # its positions are the places in the full row
    rows = kept_by_hand(model, inputs, run.last.keep, positions)
    for row, (places, kept) in enumerate(zip(original, rows, strict=True)):
        mask = torch.ones(kept.embeds.shape[:2], dtype=torch.long)
        call = {"inputs_embeds": kept.embeds, "attention_mask": mask, "position_ids": kept.positions}
        by_hand = model.model.language_model(**call, output_hidden_states=True).hidden_states
        real = inputs["attention_mask"][row].bool()
        columns = torch.arange(int(real.sum()))
        source = torch.searchsorted(places.positions[0], columns, right=True) - 1
        for got, want in zip(found, by_hand, strict=True):
            torch.testing.assert_close(got[row, real], want[0, source], rtol=1e-4, atol=1e-4)


def labels_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Every word with a token before it is to be predicted, images and padding are not."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return ids.masked_fill((mask.cumsum(1) <= 1) | (ids == model.config.image_token_id), -100)


def loss_by_hand(model: Any, inputs: dict[str, Tensor], labels: Tensor, maps: Any, positions: str) -> Tensor:
    """Mean cross entropy of the next word on the kept sequence of every row."""
    total, count = torch.zeros(()), 0
    original = kept_by_hand(model, inputs, maps, "original")  # its positions are the places in the full row
    for row, (places, kept) in enumerate(
        zip(original, kept_by_hand(model, inputs, maps, positions), strict=True)
    ):
        mask = torch.ones(kept.embeds.shape[:2], dtype=torch.long)
        output = model.model.language_model(
            inputs_embeds=kept.embeds, attention_mask=mask, position_ids=kept.positions
        )
        logits = model.lm_head(output.last_hidden_state[0, :-1])
        target = labels[row][inputs["attention_mask"][row].bool()][places.positions[0]][1:]
        total = total + cross_entropy(logits, target, ignore_index=-100, reduction="sum")
        count += int((target != -100).sum())
    return total / count


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", FROM_EMBEDDINGS)
def test_loss_and_gradients_equal_those_of_the_kept_sequence(family: str, positions: str) -> None:
    """The first word after an image is predicted from the last kept token before it."""
    model, inputs = tiny_model(family), tiny_inputs(family, images=RAGGED)
    labels = labels_of(model, inputs)
    with vlmprune.prune(model, "random@9", positions=positions) as run:
        loss = model(**inputs, labels=labels).loss
    parameters = [model.lm_head.weight, model.model.language_model.layers[0].self_attn.k_proj.weight]
    got = torch.autograd.grad(loss, parameters)
    want = loss_by_hand(model, inputs, labels, run.last.keep, positions)
    torch.testing.assert_close(loss, want, rtol=0, atol=5e-6)
    for one, other in zip(got, torch.autograd.grad(want, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)


def gradients(
    model: Any, inputs: dict[str, Tensor], spec: str, calls: int = 1
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and all gradients; ``calls`` forwards come before one backward, all inside the session."""
    model.zero_grad()
    with vlmprune.prune(model, spec):
        loss = sum(
            model(**inputs, labels=labels_of(model, inputs), use_cache=False).loss for _ in range(calls)
        )
        loss.backward()
    return loss.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("spec", ["fastervlm@9", "visionzip@9"])
def test_gradient_checkpointing_changes_nothing(spec: str, reentrant: bool) -> None:
    model, inputs = tiny_model("llava").train(), tiny_inputs(images=(1, 2))
    for calls in (1, 2):
        want = gradients(model, inputs, spec, calls)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        try:
            got = gradients(model, inputs, spec, calls)
        except UnsupportedError as error:  # where whole blocks with their hooks are checkpointed
            assert reentrant and spec == "visionzip@9" and "{'use_reentrant': False}" in str(error)
            return
        finally:
            model.gradient_checkpointing_disable()
        assert torch.equal(got[0], want[0])
        for one, other in zip(got[1], want[1], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=1e-7 + 1e-6 * float(other.abs().max()))


def test_merged_rows_pass_gradients_to_the_tokens_they_stand_for() -> None:
    model, inputs = tiny_model("llava"), tiny_inputs(images=(1,))
    pixels = inputs["pixel_values"].requires_grad_()
    with vlmprune.prune(model, "pool@4"):
        model(**inputs).logits[0, -1].sum().backward()
    patches = pixels.grad[0].abs().sum(0).unfold(0, 14, 14).unfold(1, 14, 14).sum((2, 3))
    assert bool((patches > 0).all()), "pooling reads every patch"


@pytest.mark.parametrize("family", FROM_EMBEDDINGS)
@torch.no_grad()
def test_bfloat16_keeps_nearly_what_float32_keeps(family: str) -> None:
    spec = "fastervlm(cls=mean)@12" if family == "llava_onevision" else "fastervlm@12"
    maps = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, inputs = tiny_model(family, dtype=dtype), tiny_inputs(family, images=(1,))
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with vlmprune.prune(model, spec) as run:
            assert bool(model(**inputs).logits.isfinite().all())
            assert generate(model, inputs).shape == (1, 5)
        maps[dtype] = run.last.keep[0]
        with vlmprune.prune(model, spec.replace("@12", "@1.0")):
            everything = model(**inputs).logits
        assert torch.equal(everything, model(**inputs).logits)
    assert len(maps[torch.bfloat16]) == 12 and maps[torch.float32].overlap(maps[torch.bfloat16]) >= 0.5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("vhr", "language model"),
        ("act(threshold=0.02,first_layer=0,edit=all)", "language model"),
        ("paint(first_layer=1)", "language model"),
        ("tome@9/crop", "vision tower"),
        ("flowcut@9/crop", "vision tower"),
    ],
)
def test_what_gradient_checkpointing_would_leave_out_is_refused(
    spec: str, part: str, reentrant: bool
) -> None:
    model, inputs = tiny_model("llava").train(), tiny_inputs(images=(1,))
    with vlmprune.prune(model, spec):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with pytest.raises(UnsupportedError, match=f"inside the {part}, which gradient checkpointing"):
            model(**inputs)
        model.eval()  # nothing is recomputed here
        model(**inputs)
