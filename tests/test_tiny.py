# SPDX-License-Identifier: Apache-2.0
"""Tiny models, processors and pictures: what other tests and plug-in authors rely on."""

from __future__ import annotations

import pytest
import torch
from later_families import LATER, param
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available

from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.testing.families import layout_of
from vlmprune.testing.processors import BYTES, IMAGE_ID, PROCESSED, SPECIAL_IDS, VIDEO_ID, tiny_tokenizer
from vlmprune.testing.tiny import (
    FAMILIES,
    VARIANTS,
    picture,
    tiny_bundle,
    tiny_inputs,
    tiny_model,
    tiny_processor,
    tiny_row,
)
from vlmprune.testing.tiny_configs import missing

BATCHES = ((1,), (1, 1), (1, 2, 0, 1), (2, 2), (0, 0))
HERE = [family for family in FAMILIES if not missing(family)]
TOWERS = sorted({(family, tower) for family, tower, _ in VARIANTS if family in PROCESSED and family in HERE})


def variants(test):
    cases = [param(test.__name__, *one, one_in=8) for one in VARIANTS if one[0] in HERE]
    return pytest.mark.parametrize(("family", "tower", "text"), cases)(test)


towers = pytest.mark.parametrize(("family", "tower"), TOWERS)


@torch.no_grad()
def logits(model, inputs, **more):
    return model(**inputs, **more).logits  # (B, L, V)


def new_ids(model, inputs, count=4, **more):
    ids = model.generate(**inputs, max_new_tokens=count, **more)
    return ids[:, inputs["input_ids"].shape[1] :]


def positions(inputs):
    """Positions that start at the first token of every row, where the family does not find them itself."""
    if "mm_token_type_ids" in inputs:
        return {}
    return {"position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


# --- models ---------------------------------------------------------------------------------------


def test_every_family_has_a_variant():
    assert {family for family, _, _ in VARIANTS} == set(FAMILIES)


@variants
def test_forward_and_generate_take_every_kind_of_batch(family, tower, text):
    model = tiny_model(family, tower, text)
    assert not model.training and model.dtype == torch.float32
    for images in BATCHES:
        inputs = tiny_inputs(family, images=images)
        assert ("pixel_values" in inputs) == any(images)
        assert logits(model, inputs).shape == (
            *inputs["input_ids"].shape,
            model.config.text_config.vocab_size,
        )
        assert new_ids(model, inputs).shape == (len(images), 4)


@variants
def test_a_row_alone_is_the_row_of_the_batch(family, tower, text):
    layout = layout_of(family)
    images = (1, 2, 0, 1)
    model, inputs = (
        tiny_model(family, tower, text),
        tiny_inputs(family, images=images, video=bool(layout.video) and layout.mixes),
    )
    batched, ids = logits(model, inputs, **positions(inputs)), new_ids(model, inputs)
    for i in range(len(images)):
        row = tiny_row(inputs, family, i, images)
        assert row["attention_mask"].all()
        real = inputs["attention_mask"][i].bool()
        torch.testing.assert_close(
            logits(model, row)[0], batched[i, real], atol=5e-4 if family in LATER else 5e-5, rtol=0
        )
        assert torch.equal(new_ids(model, row)[0], ids[i])


@pytest.mark.parametrize("family", HERE)
def test_a_row_of_a_batch_without_pictures_is_its_words(family):
    inputs = tiny_inputs(family, images=(0, 0))
    row = tiny_row(inputs, family, 0, (0, 0))
    assert row["attention_mask"].all() and "pixel_values" not in row
    assert torch.equal(row["input_ids"][0], inputs["input_ids"][0][inputs["attention_mask"][0].bool()])


@variants
def test_the_seed_alone_decides_the_weights(family, tower, text):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tiny_model(family, tower, text, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (
        tiny_model(family, tower, text, seed=3).state_dict(),
        tiny_model(family, tower, text, seed=4).state_dict(),
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    # buffers, such as the bias that balances experts, are not drawn
    fixed = ("running", "correction_bias")
    drawn = [k for k, v in first.items() if v.is_floating_point() and not any(part in k for part in fixed)]
    assert not any(torch.equal(first[key], other[key]) for key in drawn)


@variants
def test_weights_are_lively(family, tower, text):
    changed, firsts = 0, set()
    for seed in range(8):  # a mirrored picture changes the first word of an answer in a quarter of models
        model, inputs = tiny_model(family, tower, text, seed=seed), tiny_inputs(family, seed=seed)
        other = dict(inputs, pixel_values=inputs["pixel_values"].flip(-1))
        a, b = logits(model, inputs)[0, -1], logits(model, other)[0, -1]
        assert (a - b).abs().max() > 0.1
        changed += int(a.argmax() != b.argmax())
        firsts.add(int(a.argmax()))
        assert all(parameter.abs().sum() > 0 for parameter in model.parameters())
        if changed >= 2 and len(firsts) >= 3:
            return
    assert changed >= 2 and len(firsts) >= 3


@pytest.mark.parametrize("family", [param("never stops", family, one_in=8) for family in HERE])
def test_generation_never_stops_early_and_never_yields_a_special_id(family):
    model, inputs = tiny_model(family), tiny_inputs(family, images=(1, 1))
    greedy = new_ids(model, inputs, 40)
    torch.manual_seed(0)
    sampled = new_ids(model, inputs, 40, do_sample=True, temperature=3.0)
    for ids in (greedy, sampled):
        assert ids.shape == (2, 40) and not torch.isin(ids, torch.tensor(SPECIAL_IDS)).any()
    real = inputs["attention_mask"].bool()
    assert not torch.isin(logits(model, inputs).argmax(-1)[real], torch.tensor(SPECIAL_IDS)).any()


def test_options_reach_the_model():
    model = tiny_model(
        "llava", text="mistral", layers=6, dtype=torch.bfloat16, sliding_window=8, num_key_value_heads=4
    )
    config = model.config.text_config
    assert (config.num_hidden_layers, config.sliding_window, config.num_key_value_heads) == (6, 8, 4)
    assert model.dtype == torch.bfloat16 and new_ids(model, tiny_inputs()).shape == (1, 4)
    assert tiny_model("llava", text="mistral").config.text_config.sliding_window is None
    assert tiny_model("llava_onevision").config.vision_config.model_type == "siglip_vision_model"


def test_a_sliding_window_is_felt():
    inputs = tiny_inputs("llava", text_len=8)
    a, b = (logits(tiny_model(text=text), inputs) for text in ("mistral", "mistral_sliding"))
    torch.testing.assert_close(a[:, :8], b[:, :8])
    assert (a[:, 9:] - b[:, 9:]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("call", "hint"),
    [
        (lambda: tiny_model("lava"), "Did you mean 'llava'"),
        (lambda: tiny_model("llava", "siglop"), "Did you mean 'siglip'"),
        (lambda: tiny_model("llava", text="lama"), "Did you mean 'llama'"),
        (lambda: tiny_model("vipllava", "siglip"), "use tower='clip'"),
        (lambda: tiny_processor("bava"), "expected one of"),
        (lambda: tiny_inputs("llava", video=True), "llava takes no clips; give it images"),
    ],
)
def test_what_cannot_be_built_says_what_can(call, hint):
    with pytest.raises(UnsupportedError, match=hint):
        call()


@pytest.mark.parametrize("bad", [{"images": ()}, {"images": (1, -1)}, {"text_len": 0}])
def test_bad_batches_are_refused(bad):
    with pytest.raises(SpecError, match="expected at least one row"):
        tiny_inputs("llava", **bad)


# --- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HERE)
def test_inputs_are_ragged_left_padded_and_decided_by_the_seed(family):
    first, again, other = (tiny_inputs(family, images=(1, 2, 0), seed=seed) for seed in (5, 5, 6))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in ("input_ids", "pixel_values"))
    mask = first["attention_mask"]
    assert (mask.diff(dim=1) >= 0).all() and mask[:, -1].all() and len(set(mask.sum(1).tolist())) == 3
    assert len(set(tiny_inputs(family, images=(1, 1), size=(84, 84))["attention_mask"].sum(1).tolist())) == 2


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize(
    "size", [(84, 84), (33, 77), (100, 190), (90, 336), (336, 90), (168, 1000), (1000, 999), (251, 127)]
)
def test_placeholders_match_at_every_size(family, size):
    model, inputs = tiny_model(family, layers=1), tiny_inputs(family, size=size, text_len=1)
    ids = inputs.pop("input_ids")
    inputs.pop("attention_mask")
    features = model.model.get_image_features(**inputs)
    packed = getattr(features, "pooler_output", features)  # transformers 4 returns the list itself
    assert (ids == IMAGE_ID).sum() == sum(len(image) for image in packed)


def test_sizes_differ_inside_a_batch():
    inputs = tiny_inputs("llava_next", images=(1, 1, 1))
    assert len({tuple(size) for size in inputs["image_sizes"].tolist()}) == 3
    assert len(set((inputs["input_ids"] == IMAGE_ID).sum(1).tolist())) > 1


@pytest.mark.parametrize("images", [(0,), (1, 2, 0)])
def test_videos_by_hand(images):
    model, inputs = tiny_model("llava_onevision"), tiny_inputs("llava_onevision", images=images, video=True)
    assert (inputs["input_ids"] == VIDEO_ID).sum(1).tolist() == [3 * 3 * 3 + 1] * len(images)
    assert new_ids(model, inputs).shape == (len(images), 4)
    other = dict(inputs, pixel_values_videos=inputs["pixel_values_videos"].flip(1))
    assert (logits(model, inputs)[:, -1] - logits(model, other)[:, -1]).abs().max() > 0.05


# --- processors -----------------------------------------------------------------------------------

WIDE, TALL, SQUARE = ((220, 90), (90, 220), (200, 200))  # (width, height)
PROMPTS = {
    "one": (["<image> what is it?"], [[SQUARE]]),
    "wide and tall": (["<image> a", "<image> much longer question"], [[WIDE], [TALL]]),
    "several in one text": (["see <image> and <image> and <image>?"], [[WIDE, TALL, SQUARE]]),
    "ragged": (["<image> one", "two: <image><image>", "no image at all"], [[TALL], [WIDE, SQUARE], []]),
}


@towers
@pytest.mark.parametrize("kind", PROMPTS)
def test_processor_fits_the_model(family, tower, kind):
    model, processor = tiny_bundle(family, tower=tower)
    texts, sizes = PROMPTS[kind]
    if "mm_token_type_ids" in tiny_inputs(
        family
    ):  # released prompts of these families have a mark between two images
        texts = [text.replace("><", "> <") for text in texts]
    images = [[picture(i, size) for i, size in enumerate(row)] for row in sizes]
    # several images per text must be nested for llava_onevision, which counts them; the others take a flat
    # list too
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert logits(model, inputs).shape[:2] == inputs["input_ids"].shape
    assert new_ids(model, inputs).shape == (len(texts), 4)
    assert inputs["attention_mask"][:, -1].all()


@towers
def test_processor_takes_a_flat_list_of_images(family, tower):
    model, processor = tiny_bundle(family, tower=tower)
    images, texts = [picture(0, WIDE), picture(1, TALL)], ["<image> a", "<image> b"]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert new_ids(model, inputs).shape == (2, 4)


@towers
def test_processor_without_images(family, tower):
    model, processor = tiny_bundle(family, tower=tower)
    assert new_ids(model, processor(text=["hello", "hi"], padding=True, return_tensors="pt")).shape == (2, 4)


@pytest.mark.parametrize(("family", "tower"), [(f, t) for f, t in TOWERS if f.startswith(("llava", "vip"))])
def test_processor_and_hand_built_inputs_agree(family, tower):
    images = [[picture(0, (190, 100))], [picture(1, (100, 190))]]
    made = tiny_processor(family, tower)(
        images=images, text=["<image>"] * 2, padding=True, return_tensors="pt"
    )
    hand = tiny_inputs(family, images=(1, 1))
    assert set(made) == set(hand)
    assert {key: made[key].dtype for key in made} == {key: hand[key].dtype for key in hand}
    assert all(
        made[key].shape == hand[key].shape for key in made if key not in ("input_ids", "attention_mask")
    )
    assert torch.equal((made["input_ids"] == IMAGE_ID).sum(1), (hand["input_ids"] == IMAGE_ID).sum(1))


@pytest.mark.skipif(
    not is_torchvision_available(), reason="transformers has no video processor without torchvision"
)
def test_processor_takes_videos_where_torchvision_is_there():
    model, processor = tiny_bundle("llava_onevision")
    frames = torch.stack([torch.randint(0, 255, (3, 90, 120), dtype=torch.uint8) for _ in range(4)])
    inputs = processor(videos=[frames], text=["<video> what happens?"], padding=True, return_tensors="pt")
    assert new_ids(model, inputs).shape == (1, 4)


@pytest.mark.parametrize("family", [family for family in PROCESSED if family in HERE])
def test_chat_template(family):
    processor = tiny_processor(family)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    assert (
        processor.apply_chat_template(chat, add_generation_prompt=True)
        == "USER: <image>\nWhat is this?\nASSISTANT:"
    )
    chat[0]["content"][0]["image"] = picture()
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert new_ids(tiny_model(family), inputs).shape == (1, 4)


def test_chat_of_plain_strings():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tiny_processor().apply_chat_template(chat) == "USER: Hi\nASSISTANT: Ho\n"


@pytest.mark.parametrize(
    "text", ["USER: a house, 3 balls?\nASSISTANT: Yes.", "naïve  Straße\t東京 🏠", "a <image> b", ""]
)
def test_tokenizer_loses_nothing(text):
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == "<s>" + text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.replace("<image>", "")
    assert (
        max(ids)
        < len(tokenizer)
        == len(BYTES) + len(SPECIAL_IDS)
        == tiny_model().config.text_config.vocab_size
    )


@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "vipllava"] + ["llava_onevision"] * is_torchvision_available()
)
def test_models_and_processors_survive_saving(family, tmp_path):
    for part in (bundle := tiny_bundle(family)):
        part.save_pretrained(tmp_path)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    call = {"images": [picture()], "text": ["<image> what?"], "return_tensors": "pt"}
    before, after = new_ids(bundle[0], bundle[1](**call), 8), new_ids(model, processor(**call), 8)
    assert torch.equal(before, after)


# --- picture --------------------------------------------------------------------------------------


def test_picture_is_decided_by_its_seed_and_uses_the_whole_canvas():
    assert picture().size == (336, 336) and picture(0, (50, 20)).size == (50, 20)
    assert picture(1).tobytes() == picture(1).tobytes() != picture(2).tobytes()
    assert picture().mode == "RGB" and len(picture().getcolors(336 * 336)) > 1000
