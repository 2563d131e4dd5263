# SPDX-License-Identifier: Apache-2.0
"""Images whose tiles are pictures to the model: made fewer by a budget, and counted in an evaluation."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from served_processors import PROCESSORS, SIDE
from typer.testing import CliRunner
from wide_samples import Easy, noise, wide

import vlmprune
from vlmprune.cli import app
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.evaluation.answer.batch import Batch
from vlmprune.evaluation.answer.evaluate import evaluate
from vlmprune.models import adapter_for, loading, reads_any_size
from vlmprune.models.base import feature_list
from vlmprune.models.shrink import shrink_for
from vlmprune.testing.families.shared import GRID, image_processor
from vlmprune.testing.processors import PROCESSED
from vlmprune.testing.tiny import tiny_bundle, tiny_model

TILE = GRID**2  # tokens
LATER = ("aya_vision", "cohere2_vision")
FAMILIES = ["internvl", "idefics3", *(pytest.param(name, marks=pytest.mark.slow) for name in LATER)]


@cache
def bundle(family: str) -> tuple[Any, Any]:
    """A model that makes up to three tiles of an image, in a row, and shows the whole beside them."""
    if family in PROCESSED:
        return tiny_bundle(family)
    if family == "cohere2_vision":  # its image processor resizes by torchvision only
        pytest.importorskip("torchvision")
    processor = PROCESSORS[family]()
    if family == "idefics3":
        processor.image_processor.size["longest_edge"] = 3 * SIDE
    template = tiny_bundle("llava")[1].chat_template
    # this processor stands for its image by <video>, since its tiles are <image>
    written = "'<' + part['type'] + '>"
    processor.chat_template = template.replace(written, "'<video>") if family == "aya_vision" else template
    # some add marks of their own to the vocabulary
    return tiny_model(family, vocab_size=len(processor.tokenizer)), processor


WIDE = noise(0, 150, 450)


def native(family: str, tiles: int) -> dict[str, Any]:
    """The setting by which its processor makes so many tiles in a row, at most."""
    return {"size": {"longest_edge": tiles * SIDE}} if family == "idefics3" else {"max_patches": tiles}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_is_that_of_the_processor_and_the_model_reads_so_many(family: str) -> None:
    model, processor = bundle(family)
    adapter, found = adapter_for(model), {}
    for keep in (TILE, 2 * TILE, 3 * TILE, 4 * TILE - 1, 4 * TILE, 500):
        spec = f"downsample@{keep}"
        made = shrink_for(adapter, processor, spec)([WIDE])
        with torch.no_grad(), vlmprune.prune(model, "dense") as run:
            model(**vlmprune.encode(model, processor, WIDE, "what?", prune=spec))
            assert sum(run.last.dense_tokens) == made.tokens[0] <= keep
        assert made.dense == (4 * TILE,) and made.parts == (len(run.last.dense_tokens),)
        found[made.parts[0]] = made
    # one tile alone; two and three with the whole image
    assert sorted(found) == [1, 3, 4]
    for parts, made in found.items():
        tiles = max(parts - 1, 1)
        given = {"text": loading.prompt(processor, "what?"), "return_tensors": "pt"}
        ours = processor(images=made.images, **given, **made.options)["pixel_values"]
        theirs = processor(images=WIDE, **given, images_kwargs=native(family, tiles))["pixel_values"]
        assert ours.shape == theirs.shape
        # the tiles are pixel for pixel those of the original; the whole image is made from the smaller one
        flat, expected = ours.flatten(0, -4), theirs.flatten(0, -4)
        if family == "cohere2_vision":
            assert (flat[:tiles] - expected[:tiles]).abs().mean() < 0.05
        else:
            assert torch.equal(flat[:tiles], expected[:tiles])
        assert len(flat) == parts


@pytest.mark.parametrize("family", FAMILIES)
def test_below_a_tile_it_is_refused_with_the_least(family: str) -> None:
    model, processor = bundle(family)
    with pytest.raises(SpecError, match=f"of which this model makes {TILE} at least, in tiles of one size"):
        shrink_for(adapter_for(model), processor, f"downsample@{TILE - 1}")([WIDE])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_counts_all_tiles_of_an_image(family: str) -> None:
    """Answers equal those of ``generate``; an image is one question, however many pictures it is."""
    model, processor = bundle(family)
    samples = [wide(0, "450"), wide(1, "300"), wide(2, "450", "150")]
    specs = ["dense", "divprune@9", f"downsample@{3 * TILE}"]
    options = {"batch_size": 3, "max_new_tokens": 4}
    records = {(r.spec, r.id): r for r in evaluate(model, processor, samples, specs, Easy(), **options)}
    adapter = adapter_for(model)
    # Idefics3 enlarges every image to its longest edge
    tiles = {450: 4, 300: 7, 150: 10} if family == "idefics3" else {450: 4, 300: 3, 150: 1}
    for one in samples:
        images = one.load_images()
        parts = [adapter.parts(processor, image) for image in images]
        assert parts == [tiles[image.width] for image in images]
        text = processor.apply_chat_template(one.messages(), add_generation_prompt=True)
        for spec in specs:
            shrinks = spec.startswith("downsample")
            made = shrink_for(adapter, processor, spec)(images) if shrinks else None
            shown, options = (made.images, made.options) if made else (images, {})
            inputs = processor(text=[text], images=[shown], return_tensors="pt", **options)
            with vlmprune.prune(model, "dense" if made else spec):
                ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            record = records[spec, one.id]
            assert record.answer == answer[0].strip()
            assert record.dense_tokens == TILE * sum(parts)
            read = {"dense": TILE * sum(parts), "divprune@9": 9 * sum(parts)}
            assert record.realised_tokens == (sum(made.tokens) if made else read[spec])
            # tiles lie on no image as a whole
            assert record.on_object is None and record.keep == ()
    assert records[specs[2], "s0"].realised_tokens == 3 * TILE
    if tiles[150] == 1:
        (plain,) = evaluate(model, processor, [wide(3, "150")], ["divprune@9"], Easy(), max_new_tokens=2)
        assert len(plain.keep) == 1 and plain.on_object is not None


def test_run_counts_the_tiles_of_a_picture_and_draws_no_map_of_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "load", lambda *given: bundle("internvl"))
    WIDE.save(tmp_path / "wide.png")
    words = ["run", str(tmp_path / "wide.png"), "what?", "--model", "any", "--max-new-tokens", "2"]
    made = CliRunner().invoke(app, [*words, "--prune", f"downsample@{3 * TILE}", "--json"])
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["visual_tokens"] == {"dense": [4 * TILE], "pruned": [3 * TILE]}
    assert found["tokens_per_layer"] == [3.0 * TILE] * 4
    drawn = CliRunner().invoke(app, [*words, "--prune", "divprune@9", "--draw", str(tmp_path / "kept.png")])
    assert drawn.exit_code and "are 4 pictures to the model" in " ".join(drawn.output.split())
    assert not (tmp_path / "kept.png").exists()


@pytest.mark.parametrize(("crops", "parts"), [(False, [1, 1]), (True, [4, 3])])
def test_crops_of_got_ocr_are_counted_as_its_processor_makes_them(crops: bool, parts: list[int]) -> None:
    """Its image processor may say otherwise, and a list of lists would be the pages of a document."""
    processor = PROCESSORS["got_ocr2"]()
    template = tiny_bundle("llava")[1].chat_template
    processor.chat_template = template.replace("'<' + part['type'] + '>", "'<imgpad>")
    processor.num_image_tokens = TILE
    processor.images_kwargs = {"crop_to_patches": crops, "min_patches": 1, "max_patches": 3}
    model, sample = tiny_model("got_ocr2", vocab_size=len(processor.tokenizer)), wide(0, "450", "300")
    records = evaluate(model, processor, [sample, wide(1, "450")], ["divprune@9"], Easy(), batch_size=2)
    found = sorted(records, key=lambda record: record.id)
    images = sample.load_images()
    assert [adapter_for(model).parts(processor, image) for image in images] == parts
    assert [r.dense_tokens for r in found] == [TILE * sum(parts), TILE * parts[0]]
    assert [r.realised_tokens for r in found] == [9 * sum(parts), 9 * parts[0]]
    text = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
    inputs = processor(text=[text], images=images, return_tensors="pt")
    with vlmprune.prune(model, "divprune@9"):
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    assert found[0].answer == answer.strip()
    frames = Batch.make([sample], processor, model, frames=True)
    assert frames.pictures == [range(2)] and frames.inputs["pixel_values"].shape[0] == 2


@pytest.mark.parametrize("family", ["internvl", "idefics3"])
def test_frames_of_a_clip_are_not_cut_into_tiles(family: str) -> None:
    model, processor = bundle(family)
    sample = wide(0, "450", "450")
    batch = Batch.make([sample], processor, model, frames=True)
    assert batch.pictures == [range(2)] and batch.inputs["pixel_values"].flatten(0, -4).shape[0] == 2
    assert Batch.make([sample], processor, model).pictures == [range(8)]


def test_smolvlm_has_the_sizes_of_idefics3() -> None:
    model = tiny_model("smolvlm")
    sizes = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = SimpleNamespace(image_processor=image_processor("SmolVLM", **sizes))
    for keep, tiles in ((TILE, 1), (3 * TILE, 3), (500, 4)):
        made = shrink_for(adapter_for(model), processor, f"downsample@{keep}")([WIDE])
        pixels = processor.image_processor(images=[made.images], return_tensors="pt", do_resize=False)
        assert pixels["pixel_values"].shape[1] == tiles
        with torch.no_grad():
            read = model.model.get_image_features(**pixels)
        assert torch.cat(feature_list(read)).flatten(0, -2).shape[0] == made.tokens[0] == tiles * TILE


@pytest.mark.parametrize("change", [{"do_image_splitting": False}, {"size": {"longest_edge": 3 * SIDE + 1}}])
def test_a_processor_that_splits_nothing_or_unevenly_is_refused(change: dict[str, Any]) -> None:
    sizes = {"size": {"longest_edge": 3 * SIDE}, "max_image_size": {"longest_edge": SIDE}, **change}
    processor = SimpleNamespace(image_processor=image_processor("Idefics3", **sizes))
    with pytest.raises(UnsupportedError, match=r"idefics3 has do_image_splitting=.* a multiple of the tile"):
        adapter_for(tiny_model("idefics3")).resolution(processor)


def test_canvases_of_many_tiles_of_one_shape_are_not_mixed_up() -> None:
    """A picture of 3 x 3 tiles would be given 4 x 4, where these are allowed."""
    model, processor = tiny_bundle("internvl")
    images = image_processor(
        "GotOcr2", size=processor.image_processor.size, crop_to_patches=True, min_patches=1, max_patches=30
    )
    many = type(processor)(
        images, processor.tokenizer, getattr(processor, "video_processor", None), image_seq_length=TILE
    )
    adapter = adapter_for(model)
    square = noise(1, 9 * SIDE, 9 * SIDE)
    assert adapter.parts(many, square) == 26  # 5 x 5 and the whole
    for side, parts in ((4, 17), (3, 10), (2, 5), (1, 1)):
        made = shrink_for(adapter, many, f"downsample@{(side**2 + 1) * TILE}")([square])
        assert made.parts == (parts,) and adapter.parts(many, made.images[0]) == parts


def test_gemma_3_makes_as_many_tokens_of_every_picture() -> None:
    with pytest.raises(UnsupportedError, match="gemma3 makes as many tokens of every picture, and pan"):
        adapter_for(tiny_model("gemma3")).resolution(None)
    tiled = ("internvl", "idefics3", "smolvlm", "aya_vision", "cohere2_vision", "gemma3", "lfm2_vl")
    assert not any(map(reads_any_size, tiled))
