# SPDX-License-Identifier: Apache-2.0
"""The second look: regions against a slow transcription, attention against eager maps, and whole answers."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import vlmprune
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.hooks.attention_tap import TappedConfig
from vlmprune.methods.carve import middle_layers
from vlmprune.methods.carve.region import box_of, connected, contrast, kept_mask, refined_size
from vlmprune.models.loading import encode, prompt
from vlmprune.second_look import ask, on_picture, read
from vlmprune.second_look.watch import watching
from vlmprune.testing.tiny import tiny_inputs, tiny_model

QUESTION = "What shape is red?"


@pytest.fixture(scope="module")
def loaded():
    return vlmprune.load("tiny")


@pytest.fixture(scope="module")
def picture():
    return vlmprune.example()[0]


# --- the region -----------------------------------------------------------------------------------


def flooded(mask):
    """Labels in reading order, by walking from pixel to pixel."""
    labels, number = np.zeros(mask.shape, dtype=int), 0
    for start in np.argwhere(mask).tolist():
        if labels[tuple(start)]:
            continue
        number, todo = number + 1, [start]
        while todo:
            row, column = todo.pop()
            inside = 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]
            if inside and mask[row, column] and not labels[row, column]:
                labels[row, column] = number
                todo += [[row + 1, column], [row - 1, column], [row, column + 1], [row, column - 1]]
    return labels


@pytest.mark.parametrize("share", [0.2, 0.5, 0.6, 0.8])
def test_regions_are_those_of_a_walk_from_pixel_to_pixel(share: float) -> None:
    mask = np.random.default_rng(int(share * 10)).random((37, 29)) < share
    ours, walked = connected(mask), flooded(mask)
    pairs = {*zip(ours.ravel().tolist(), walked.ravel().tolist(), strict=True)}
    assert len(pairs) == ours.max() + 1 == walked.max() + 1  # one to one
    assert (0, 0) in pairs


def test_regions_that_meet_below_are_one_and_nothing_is_none() -> None:
    mask = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 0, 1]], dtype=bool)
    assert connected(mask).max() == 2
    assert connected(np.zeros((2, 3), dtype=bool)).max() == 0
    assert connected(np.ones((2, 3), dtype=bool)).tolist() == [[1] * 3] * 2


def test_the_best_regions_stay() -> None:
    values = torch.zeros(10, 10)
    values[0, 0], values[2, 4:6], values[5, 5], values[9, 9] = 9.0, 3.0, 4.0, 1.0
    by_sum = kept_mask(values, top_share=0.05, min_regions=2)
    assert np.argwhere(by_sum).tolist() == [[0, 0], [2, 4], [2, 5]]
    by_size = kept_mask(values, top_share=0.05, min_regions=1, strategy="size")
    assert np.argwhere(by_size).tolist() == [[2, 4], [2, 5]]
    assert box_of(by_sum) == (0, 0, 6, 3)
    assert kept_mask(values, top_share=0.05, strategy="drop_small").sum() == 5


def test_a_map_without_contrast_keeps_the_picture() -> None:
    attention = torch.rand(3, 2, 36)
    flat = on_picture(contrast(attention, attention, 1e-12), (6, 6), "stretch", (31, 17))
    assert float(flat.max() - flat.min()) < 1e-6 * float(flat.max())
    assert box_of(kept_mask(torch.ones(17, 31))) == (0, 0, 31, 17)


def test_only_the_direction_of_the_question_counts() -> None:
    question, general = torch.rand(2, 2, 36), torch.rand(3, 2, 36)
    masks = [
        kept_mask(on_picture(contrast(factor * question, general, 1e-8), (6, 6), "stretch", (30, 30)))
        for factor in (1.0, 8.0)
    ]
    assert np.array_equal(*masks)


def test_steps_are_weighted_and_cut_to_the_shorter_answer() -> None:
    question, general = torch.rand(3, 1, 4).double(), torch.rand(2, 1, 4).double()
    parts = question[:2, 0] / (general[:, 0] + 0.1)
    torch.testing.assert_close(contrast(question, general, 0.1), parts[0] + 2 * parts[1])
    torch.testing.assert_close(contrast(question, general, 0.1, "first"), parts[0])
    torch.testing.assert_close(contrast(question, general, 0.1, "last"), parts[1])


def test_a_thin_crop_gets_no_larger_than_the_picture() -> None:
    assert refined_size((0, 0, 10, 300), (300, 300), official=True) == (300, 9000)
    width, height = refined_size((0, 0, 10, 300), (300, 300))
    assert width * height <= 300 * 300
    assert refined_size((0, 0, 300, 300), (300, 300)) == (300, 300)


def test_a_centred_view_leaves_the_rim_at_zero() -> None:
    pixels = on_picture(torch.ones(36), (6, 6), "center", (20, 12))
    assert pixels[:, :4].sum() == pixels[:, 16:].sum() == 0
    assert bool((pixels[:, 4:16] == 1).all())


# --- the attention --------------------------------------------------------------------------------


def test_attention_is_that_of_eager_maps_step_by_step() -> None:
    model, eager, inputs = tiny_model(), tiny_model(), tiny_inputs()
    eager.set_attn_implementation("eager")
    options = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad(), watching(model, [1, 3]) as watch:
        model.generate(**inputs, **options)
        wanted = eager.generate(
            **inputs, **options, output_attentions=True, return_dict_in_generate=True
        ).attentions
    columns = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    maps = torch.stack(
        [torch.stack([step[layer][0, :, -1, columns].mean(0) for layer in (1, 3)]) for step in wanted]
    )
    torch.testing.assert_close(watch.attention(), maps, rtol=1e-4, atol=1e-6)
    assert watch.grid == (6, 6)


def test_tokens_that_were_cut_have_none_and_the_others_keep_their_place() -> None:
    model, inputs = tiny_model(), tiny_inputs()
    with torch.no_grad(), vlmprune.prune(model, "uniform@9+fastv(layer=2)@4") as run:
        with watching(model, [1, 3]) as watch:
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        (kept,) = run.last.keep
        assert run.attached
    seen = watch.attention() > 0  # (T, layers, N)
    assert seen[:, 0].sum(dim=1).tolist() == [9, 9]
    assert torch.equal(seen[0, 1].nonzero()[:, 0], kept.keep_idx.cpu())


def test_pictures_of_several_grids_are_refused() -> None:
    model, inputs = tiny_model("llava_next"), tiny_inputs("llava_next")
    with watching(model, [1]), torch.no_grad(), pytest.raises(UnsupportedError, match="of one grid"):
        model(**inputs)


# --- the whole ------------------------------------------------------------------------------------


def test_a_second_look_answers_and_leaves_the_model_alone(loaded, picture) -> None:
    model, processor = loaded
    result = vlmprune.refine(model, processor, picture, QUESTION, max_new_tokens=4)
    left, top, right, bottom = result.box
    assert result.mask.shape == tuple(result.contrast.shape) == picture.size[::-1]
    assert box_of(result.mask) == result.box
    assert result.image.size == refined_size(result.box, picture.size)
    assert result.token_score.shape == (144,)
    assert 0 <= left < right <= picture.size[0] and 0 <= top < bottom <= picture.size[1]
    inputs = encode(model, processor, picture, QUESTION)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    plain = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert result.first == plain.strip()
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    assert not any(isinstance(config, TappedConfig) for config in configs)
    asking = partial(ask, model, processor)
    text = prompt(processor, QUESTION)
    seen, grid, answer = read(model, asking, picture, text, middle_layers(8), 4)
    assert seen.shape[1:] == (len(middle_layers(8)), 144)
    assert (grid, answer) == (((12, 12), "center"), result.first)


def test_it_goes_on_under_pruning_and_with_the_first_step_alone(loaded, picture) -> None:
    model, processor = loaded
    with vlmprune.prune(model, "divprune@36") as run:
        result = vlmprune.refine(model, processor, picture, QUESTION, steps="first", max_new_tokens=3)
        assert run.last.realised_tokens == [36, 36]  # of both pictures of the last question
    assert int((result.token_score > 0).sum()) == 36
    assert isinstance(result.answer, str) and result.answer


def test_two_pictures_stand_in_one_prompt(loaded) -> None:
    _, processor = loaded
    image = processor.image_token
    assert prompt(processor, "Why?", 2).count(image) == 2 * prompt(processor, "Why?").count(image)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [99]}, "decoder layers of 0..7"),
        ({"layers": []}, "one or more decoder layers"),
        ({"steps": "second"}, "steps"),
        ({"strategy": "best"}, "strategy"),
        ({"lam": 0.0}, "lam"),
        ({"top_share": 2.0}, "top_share"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_options_are_checked(loaded, picture, options: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        vlmprune.refine(*loaded, picture, QUESTION, **options)


def test_layers_are_those_of_the_paper() -> None:
    assert middle_layers(32) == [20, 21, 22, 23, 24, 25]
    assert middle_layers(1) == [0]
