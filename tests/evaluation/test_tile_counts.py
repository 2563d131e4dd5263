# SPDX-License-Identifier: Apache-2.0
"""Evaluations of families whose tiles are pictures of their own, of which only the number is known."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from available import skip_without
from tiled_processors import BY_TORCHVISION, TILED
from wide_samples import Easy, wide

import vlmprune
from vlmprune.evaluation.answer.batch import Batch
from vlmprune.evaluation.answer.evaluate import evaluate
from vlmprune.models import adapter_for
from vlmprune.testing.tiny import tiny_bundle, tiny_model

# of pictures that are 450, 300 and 150 wide and 150 high; what LFM2-VL does not cut is small enough
PARTS = {
    "gemma3": {450: 4, 300: 3, 150: 1},
    "idefics2": {450: 5, 300: 5, 150: 5},
    "lfm2_vl": {450: 4, 300: 1, 150: 1},
    "minicpmv4_6": {450: 4, 300: 3, 150: 1},
    "perception_lm": {450: 4, 300: 3, 150: 5},
}
# its processor does not say how to leave its quarters out
WITHOUT_TILES = sorted({*TILED} - {"idefics2"})


@cache
def bundle(family: str) -> tuple[Any, Any]:
    if family in BY_TORCHVISION:
        pytest.importorskip("torchvision")
    skip_without(family)
    processor, template = TILED[family](), tiny_bundle("llava")[1].chat_template
    if family == "gemma3":
        template = template.replace("'<' + part['type'] + '>", "'[' + '")
    processor.chat_template = template
    # some add marks of their own to the vocabulary
    return tiny_model(family, vocab_size=len(processor.tokenizer)), processor


@pytest.mark.parametrize("family", sorted(TILED))
def test_an_evaluation_counts_the_tiles_that_the_model_sees(family: str) -> None:
    model, processor = bundle(family)
    samples = [wide(0, "450"), wide(1, "300"), wide(2, "150")]
    specs = ["dense", "divprune@4"]
    records = {
        (record.spec, record.id): record
        for record in evaluate(model, processor, samples, specs, Easy(), batch_size=1, max_new_tokens=2)
    }
    for one in samples:
        (image,) = one.load_images()
        parts = adapter_for(model).parts(processor, image)
        assert parts == PARTS[family][image.width]
        text = processor.apply_chat_template(one.messages(), add_generation_prompt=True)
        inputs = processor(text=[text], images=[[image]], return_tensors="pt")
        with vlmprune.prune(model, "divprune@4") as run:
            ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert run.last is not None and len(run.last.dense_tokens) == parts
        answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        pruned, dense = records["divprune@4", one.id], records["dense", one.id]
        assert pruned.answer == answer[0].strip()
        assert pruned.realised_tokens == 4 * parts
        assert pruned.dense_tokens == dense.realised_tokens == sum(run.last.dense_tokens)


@pytest.mark.parametrize("family", ["gemma3", "minicpmv4_6"])
def test_tiles_of_several_images_of_a_batch_are_told_apart(family: str) -> None:
    model, processor = bundle(family)
    samples = [wide(0, "450", "150"), wide(1, "300")]
    assert Batch.make(samples, processor, model).pictures == [range(5), range(5, 8)]
    found = evaluate(model, processor, samples, ["divprune@4"], Easy(), batch_size=2, max_new_tokens=2)
    assert {one.id: one.realised_tokens for one in found} == {"s0": 20, "s1": 12}


@pytest.mark.parametrize("family", WITHOUT_TILES)
def test_frames_of_a_clip_are_not_cut_into_tiles(family: str) -> None:
    model, processor = bundle(family)
    batch = Batch.make([wide(0, "450", "450")], processor, model, frames=True)
    assert batch.pictures == [range(2)]
    with vlmprune.prune(model, "divprune@4") as run:
        model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
    assert run.last is not None and len(run.last.dense_tokens) == 2


def test_images_that_are_not_sliced_are_one_picture() -> None:
    model, processor = bundle("minicpmv4_6")
    images, (picture,) = processor.image_processor, wide(0, "450").load_images()
    images.slice_mode = False
    try:
        assert adapter_for(model).parts(processor, picture) == 1
    finally:
        images.slice_mode = True
    model, processor = bundle("gemma3")
    kept, processor.images_kwargs = processor.images_kwargs, type(processor).images_kwargs
    try:
        assert adapter_for(model).parts(processor, picture) == 1
    finally:
        processor.images_kwargs = kept
