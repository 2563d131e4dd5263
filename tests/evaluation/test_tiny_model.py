# SPDX-License-Identifier: Apache-2.0
"""The small LLaVA of the benchmark: classes, tokenizer, chat template, reload."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from vlmprune.evaluation.tasks.shapes import shapes
from vlmprune.evaluation.tasks.shapes.model import EOS, GRID, IMAGE, UNKNOWN, build_model, build_processor
from vlmprune.evaluation.tasks.shapes.vocabulary import WORDS

MiB = 1024 * 1024


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The model and the processor, and both as they come back from disk."""
    folder = tmp_path_factory.mktemp("model")
    model, processor = build_model(seed=3), build_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    again = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    return model, processor, again, transformers.AutoProcessor.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def samples():
    return shapes().samples("dev", 30)


def inputs(processor, sample):
    text = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
    return processor(images=sample.load_images(), text=text, return_tensors="pt")


def test_it_is_a_plain_llava_that_fits(bundle):
    model, _, _, _, folder = bundle
    text = model.config.text_config
    assert type(model) is transformers.LlavaForConditionalGeneration
    assert text.num_key_value_heads < text.num_attention_heads and text.num_hidden_layers == 8
    assert model.config.vision_config.num_hidden_layers >= 6
    assert GRID * GRID >= 144
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 12 * MiB


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = build_model(1), build_model(1), build_model(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = list(zip(a.state_dict().values(), b.state_dict().values(), c.state_dict().values(), strict=True))
    assert all(torch.equal(x, y) for x, y, _ in pairs) and not all(torch.equal(x, z) for x, _, z in pairs)


def test_what_is_reloaded_answers_the_same(bundle, samples):
    model, processor, again, reloaded, _ = bundle
    for sample in samples[5:10]:
        mine, theirs = inputs(processor, sample), inputs(reloaded, sample)
        assert set(mine) == set(theirs) and all(torch.equal(mine[key], theirs[key]) for key in mine)
        with torch.no_grad():
            assert torch.equal(model(**mine).logits, again(**theirs).logits)


def test_every_word_of_the_benchmark_is_known(bundle):
    tokenizer = bundle[1].tokenizer
    for sample in shapes().samples("test", 400):
        for text in (sample.question, *(word for turn in sample.history for word in turn)):
            ids = tokenizer(text).input_ids
            assert UNKNOWN not in ids
            assert tokenizer.decode(ids) == text
    assert len(tokenizer) == len(set(WORDS)) == len(WORDS)


def test_case_and_marks_are_understood(bundle):
    tokenizer = bundle[1].tokenizer
    assert (
        tokenizer("In the First image, what Color is the circle?").input_ids
        == tokenizer("in the first image , what color is the circle ?").input_ids
    )


def test_a_prompt_holds_its_images_and_ends_where_the_answer_starts(bundle, samples):
    processor = bundle[3]
    for sample in samples:
        row = inputs(processor, sample)
        ids = row["input_ids"][0].tolist()
        assert ids.count(IMAGE) == GRID * GRID * len(sample.images) and UNKNOWN not in ids
        assert ids.count(EOS) == len(sample.history)
        assert WORDS[ids[-1]] == "assistant:" and ids.count(ids[-1]) == len(sample.history) + 1
        assert row["pixel_values"].shape == (len(sample.images), 3, 144, 144)


def test_a_word_before_each_of_several_images(bundle, samples):
    ids = inputs(bundle[3], next(s for s in samples if s.family == "multi_image"))["input_ids"][0].tolist()
    assert [WORDS[i] for i in ids[:3]] == ["<s>", "user:", "first"]
    second = 3 + GRID * GRID
    assert WORDS[ids[second]] == "second" and ids[second + 1] == IMAGE


def test_pictures_pass_the_processor_unresized(bundle, samples):
    processor, image = bundle[3], samples[0].load_images()[0]
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    images = processor.image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.image_mean, images.image_std))
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.allclose(pixels * std + mean, raw / 255, atol=1e-5)
