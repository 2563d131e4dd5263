# SPDX-License-Identifier: Apache-2.0
"""Several calls on one cache: new images, drafts, static caches, switching off and on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmprune.api import prune
from vlmprune.core.keepmap import KeepMap
from vlmprune.errors import InvariantError
from vlmprune.testing.conformance import generate, shared_model
from vlmprune.testing.processors import EOS_ID
from vlmprune.testing.reference import greedy, kept_by_hand
from vlmprune.testing.tiny import tiny_inputs, tiny_model

NEW = 4
Inputs = dict[str, Tensor]


def first_turn(model: Any, inputs: Inputs) -> tuple[Tensor, Any]:
    """(answer (B, n), cache)."""
    output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    return output.sequences[:, inputs["input_ids"].shape[1] :], output.past_key_values


def joined(first: Inputs, answer: Tensor, second: Inputs) -> Inputs:
    """The whole dialogue as one prompt."""
    ids = torch.cat([first["input_ids"], answer, second["input_ids"]], 1)
    mask = torch.cat([first["attention_mask"], torch.ones_like(answer), second["attention_mask"]], 1)
    names = [name for name in ("pixel_values", "image_sizes") if name in first and name in second]
    pixels = {name: torch.cat([first[name], second[name]]) for name in names}
    return {"input_ids": ids, "attention_mask": mask, **pixels}


def second_turn(model: Any, first: Inputs, answer: Tensor, second: Inputs, cache: Any) -> Tensor:
    """(B, n) answer to the second prompt on the kept cache: all ids, but the pixels of the new images
    only."""
    return generate(
        model,
        second | {name: joined(first, answer, second)[name] for name in ("input_ids", "attention_mask")},
        cache=cache,
        max_new_tokens=NEW,
    )


def skip_unless_plain_model_can(model: Any, first: Inputs, second: Inputs) -> None:
    """Skip where the model without hooks cannot take an image in turn two."""
    answer, cache = first_turn(model, first)
    got = second_turn(model, first, answer, second, cache)
    if not torch.equal(got, generate(model, joined(first, answer, second), max_new_tokens=NEW)):
        pytest.skip(
            "this transformers drops the pixels of a second turn on a kept cache, also without pruning"
        )


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "vipllava"])
def test_a_new_image_in_turn_two_is_cut_too(family: str, positions: str) -> None:
    model = shared_model(family, None, None)
    first, second = (tiny_inputs(family, images=(1,), seed=seed) for seed in (0, 1))
    skip_unless_plain_model_can(model, first, second)
    with prune(model, "fastervlm@9", positions=positions) as run:
        answer, cache = first_turn(model, first)
        maps = run.last.keep
        got = second_turn(model, first, answer, second, cache)
        maps = maps + run.last.keep
        dropped = sum(one.total - len(one) for one in maps)
        assert cache.get_seq_length() - cache.get_seq_length(0) == dropped
    dialogue = kept_by_hand(model, joined(first, answer, second), maps, positions)[0]
    assert got[0].tolist() == greedy(model, dialogue, NEW)


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_a_ragged_batch_takes_new_images_in_turn_two(positions: str) -> None:
    model = shared_model("llava", None, None)
    first, second = tiny_inputs(images=(1, 0), seed=0), tiny_inputs(images=(1, 1), seed=1, text_len=4)
    second = {
        **second,
        "attention_mask": torch.ones_like(second["attention_mask"]),
    }  # padding reads as words here
    skip_unless_plain_model_can(model, first, second)
    with prune(model, "fastervlm@9", positions=positions) as run:
        answer, cache = first_turn(model, first)
        maps = run.last.keep
        got = second_turn(model, first, answer, second, cache)
        maps = [maps[0], *run.last.keep]
    for row, kept in enumerate(kept_by_hand(model, joined(first, answer, second), maps, positions)):
        assert got[row].tolist() == greedy(model, kept, NEW)


def test_a_prefix_cached_dense_is_continued_with_a_cut_image() -> None:
    model = shared_model("llava", None, None)
    first, second = (tiny_inputs(images=(1,), seed=seed) for seed in (0, 1))
    skip_unless_plain_model_can(model, first, second)
    answer, cache = first_turn(model, first)
    with prune(model, "fastervlm@9") as run:
        got = second_turn(model, first, answer, second, cache)
        maps = [KeepMap(torch.arange(36), 36, ((6, 6),)), *run.last.keep]
    dialogue = kept_by_hand(model, joined(first, answer, second), maps, "compact")[0]
    assert got[0].tolist() == greedy(model, dialogue, NEW)


@pytest.mark.parametrize("images", [(1,), (1, 0)])
def test_switching_off_between_turns_keeps_the_cut_cache_right(images: tuple[int, ...]) -> None:
    """Disabled, the session cuts nothing new, but text on a cut cache is answered as before."""
    model = shared_model("llava", None, None)
    first, second = tiny_inputs(images=images), tiny_inputs(images=[0] * len(images), seed=1)
    second = {**second, "attention_mask": torch.ones_like(second["attention_mask"])}
    answers = []
    for enabled in (True, False):
        with prune(model, "fastervlm@9") as run:
            answer, cache = first_turn(model, first)
            run.enabled = enabled
            answers.append(second_turn(model, first, answer, second, cache))
    assert torch.equal(*answers)


def test_drafts_from_the_prompt_change_no_answer() -> None:
    """Assisted decoding, with drafts accepted and rejected, also before the first token of the answer."""
    model, drafted = shared_model("llava", None, None), 0
    options = {"max_new_tokens": 30, "eos_token_id": EOS_ID}
    drafts = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    for seed in range(3):
        inputs = tiny_inputs(images=(1,), seed=seed, text_len=40)
        plain = generate(model, inputs, **options)
        assert torch.equal(generate(model, inputs, **options, **drafts), plain), "the plain model differs"
        with prune(model, "fastervlm@9"):
            want = generate(model, inputs, **options)
            widths: list[int] = []
            hook = model.lm_head.register_forward_pre_hook(
                lambda module, args, widths=widths: widths.append(args[0].shape[1])
            )
            try:
                got = generate(model, inputs, **options, **drafts)
            finally:
                hook.remove()
        assert torch.equal(got, want)
        drafted += sum(width > 1 for width in widths)
    assert drafted > 5


def cut_run(model: Any, inputs: Inputs) -> Any:
    """The cache of one call."""
    with torch.no_grad():
        return model(**inputs, use_cache=True).past_key_values


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_text_after_the_last_image_can_be_cropped_away(positions: str) -> None:
    """A cropped cache continues as one that never saw what was cropped."""
    model = shared_model("llava", None, None)
    inputs = tiny_inputs(images=(1, 1), text_len=6)
    short = {**inputs, **{name: inputs[name][:, :-3] for name in ("input_ids", "attention_mask")}}
    with prune(model, "fastervlm@9", positions=positions), torch.no_grad():
        cropped, fresh = cut_run(model, inputs), cut_run(model, short)
        cropped.crop(-3)
        assert cropped.get_seq_length() == fresh.get_seq_length() == short["input_ids"].shape[1]
        step = {
            "input_ids": inputs["input_ids"][:, -3:-2],
            "attention_mask": inputs["attention_mask"][:, :-2],
        }
        logits = [model(**step, past_key_values=cache).logits for cache in (cropped, fresh)]
    torch.testing.assert_close(*logits, rtol=0, atol=2e-5)


def test_an_image_that_was_cut_cannot_be_cropped() -> None:
    model, inputs = shared_model("llava", None, None), tiny_inputs(images=(1,), text_len=6)
    with prune(
        model, "uniform@9"
    ):  # ends before the last patch, so the last column that lost something is known
        cache = cut_run(model, inputs)
        seen = inputs["input_ids"].shape[1]
        with pytest.raises(InvariantError, match="after the last image"):
            cache.crop(seen - 6 - 1 - 2)
        assert cache.get_seq_length() == seen


def test_static_caches_are_used_again_for_other_prompts() -> None:
    """generate keeps a static cache on the model: a long cut prompt, a short one, text alone, all as with a
    fresh cache.
    """
    model = shared_model("llava", None, None)
    calls = [tiny_inputs(images=images, seed=seed) for seed, images in enumerate([(1,), (2,), (0,), (1,)])]
    with prune(model, "fastervlm@9"):
        want = [generate(model, call) for call in calls]
        got = [generate(model, call, cache_implementation="static") for call in calls]
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    dense = generate(model, calls[0])
    assert torch.equal(generate(model, calls[0], cache_implementation="static"), dense), (
        "the kept static cache is dense again"
    )


def test_beams_keep_their_own_rows() -> None:
    """Ragged beams on a cut cache equal the beams of each row alone."""
    model = shared_model("llava", None, None)
    inputs = tiny_inputs(images=(1, 0))
    with prune(model, "fastervlm@9"):
        together = generate(model, inputs, num_beams=3)
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
            alone |= {"pixel_values": inputs["pixel_values"]} if row == 0 else {}
            assert torch.equal(generate(model, alone, num_beams=3)[0], together[row])


@pytest.mark.parametrize("spec", ["fastervlm@9", "fastv@9", "divprune@9"])
def test_an_assistant_model_changes_no_answer(spec: str) -> None:
    model, assistant, inputs = shared_model("llava", None, None), tiny_model("llava"), tiny_inputs("llava")
    with torch.no_grad():
        for weight in assistant.parameters():
            weight.add_(
                0.02 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
            )
    if not torch.equal(generate(model, inputs), generate(model, inputs, assistant_model=assistant)):
        pytest.skip("assisted decoding differs from greedy in the model without hooks")
    with prune(model, spec):
        want = generate(model, inputs, max_new_tokens=12)
        assert torch.equal(generate(model, inputs, max_new_tokens=12, assistant_model=assistant), want)
