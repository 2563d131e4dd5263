# SPDX-License-Identifier: Apache-2.0
"""The baseline that shrinks the picture: its sizes, its answers in an evaluation, and where it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app
from vlmprune.core.budget import Budget
from vlmprune.errors import EvaluationError, SpecError, UnsupportedError
from vlmprune.evaluation.answer.batch import Batch
from vlmprune.evaluation.answer.evaluate import entrant, evaluate
from vlmprune.evaluation.tasks.sample import Sample
from vlmprune.methods.baselines import Downsample
from vlmprune.models import adapter_for, loading, reads_any_size
from vlmprune.models.shrink import shrink_for
from vlmprune.testing.tiny import tiny_bundle, tiny_model

FAMILIES = ["qwen2_vl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("qwen2_5_vl", "qwen3_vl"))]
TOKEN = 28  # pixels along each side of a token of the tiny models


def noise(seed: int, height: int = 80, width: int = 120) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Noisy(Sample):
    """A sample with a picture of noise for each of its image names."""

    def load_images(self) -> list[Image.Image]:
        return [noise(int(name), 80 + 40 * int(name)) for name in self.images]

    def object_masks(self) -> list[np.ndarray]:
        """The upper half."""
        whole = [np.zeros(image.size[::-1], dtype=bool) for image in self.load_images()]
        for mask in whole:
            mask[: mask.shape[0] // 2] = True
        return whole


class Easy:
    """A task to which every answer is right."""

    def score(self, sample: Sample, answer: str) -> float:
        return 1.0


def sample(number: int, *images: str) -> Noisy:
    return Noisy(
        id=f"s{number}",
        cluster=f"c{number}",
        family="noise",
        group="general",
        question="what?",
        answers=("x",),
        history=(),
        images=images,
    )


@pytest.mark.parametrize("rows", [1, 2, 7, 24])
@pytest.mark.parametrize("cols", [1, 3, 24, 31])
def test_the_grid_has_the_shape_of_the_picture_and_no_more_tokens_than_the_budget(rows, cols):
    for k in range(1, rows * cols + 2):
        r, c = Downsample().shrink((rows, cols), k)
        assert 1 <= r <= rows and 1 <= c <= cols and r * c <= max(k, 1)
        # one more row or column would be too many, or is not there
        assert c == cols or r * (c + 1) > k
        if k >= rows * cols:
            assert (r, c) == (rows, cols)
    assert Downsample().shrink((24, 24), 64) == (8, 8)
    # 7 x 9 is nearer to 3 : 4 than 6 x 10
    assert Downsample().shrink((18, 24), 64) == (7, 9)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_reads_the_shrunk_picture_and_the_record_says_both_numbers(family):
    """Answers equal those of a picture that was made smaller by hand, rows of a batch those of each alone."""
    model, processor = tiny_bundle(family)
    samples = [sample(0, "0"), sample(1, "1"), sample(2), sample(3, "2", "0")]
    specs = ["dense", "downsample@6", "downsample@0.5"]
    options = {"max_new_tokens": 4, "batch_size": 3}
    records = {(r.spec, r.id): r for r in evaluate(model, processor, samples, specs, Easy(), **options)}
    assert len(records) == 12
    for one in samples:
        text = processor.apply_chat_template(one.messages(), add_generation_prompt=True)
        for spec in specs[1:]:
            record, dense = records[spec, one.id], records["dense", one.id]
            made = [smaller(processor, picture, spec.partition("@")[2]) for picture in one.load_images()]
            tokens = sum(count for _, count in made)
            assert record.realised_tokens == record.layer_tokens == tokens
            assert record.dense_tokens == dense.dense_tokens == dense.realised_tokens
            assert tokens < dense.realised_tokens or not made
            assert record.on_object is None if not made else 0.3 < record.on_object < 0.7
            assert record.encoding == ("each" if made else "none")
            pictures = [picture for picture, _ in made] or None
            size = {**dict(processor.image_processor.size), "shortest_edge": 1}
            inputs = processor(text=[text], images=pictures, return_tensors="pt", size=size)
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert record.answer == answer[0].strip()


def smaller(processor: Any, picture: Image.Image, keep: str) -> tuple[Image.Image, int]:
    """A picture made smaller by hand, and its tokens."""
    grid = processor.image_processor(images=[picture], return_tensors="pt")["image_grid_thw"][0]
    rows, cols = (int(patches) // 2 for patches in grid[1:])
    r, c = Downsample().shrink((rows, cols), Budget.of(keep).count(rows * cols))
    return picture.resize((c * TOKEN, r * TOKEN), Image.Resampling.BICUBIC), r * c


def test_tokens_that_differ_from_the_plan_are_an_error():
    """A processor that enlarges the picture again must not pass for a smaller picture."""
    model, processor = tiny_bundle("qwen2_vl")
    made = entrant(model, processor, "downsample@2")
    assert made.shrink is not None
    enlarging = replace(made.shrink.resolution, unchanged=lambda pixels: {})
    batch = Batch.make([sample(0, "0")], processor, model)
    wrong = batch.shrunk(replace(made.shrink, resolution=enlarging), processor, model)
    with torch.no_grad(), made.session as session:
        model(**wrong.inputs)
    with pytest.raises(EvaluationError, match="changed the size of the pictures again"):
        wrong.check(session.last.dense_tokens, "downsample@2")
    right = batch.shrunk(made.shrink, processor, model)
    with torch.no_grad(), made.session as session:
        model(**right.inputs)
    right.check(session.last.dense_tokens, "downsample@2")
    assert session.last.method == "downsample@2"


def test_strict_refuses_a_picture_that_has_fewer_tokens():
    model, processor = tiny_bundle("qwen2_vl")
    records = evaluate(model, processor, [sample(0, "0")], ["downsample@500"], Easy(), strict=True)
    with pytest.raises(SpecError, match="strict: keep=500 tokens but a picture gives 24"):
        list(records)


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        (lambda m, p: vlmprune.prune(m, "downsample@9"), UnsupportedError, "vlmprune.encode"),
        (lambda m, p: vlmprune.prune(m, Downsample(), keep=9), UnsupportedError, "vlmprune.encode"),
        (lambda m, p: vlmprune.score(m, {}, "downsample"), UnsupportedError, "vlmprune.encode"),
        (lambda m, p: vlmprune.select("downsample", keep=9), UnsupportedError, "vlmprune.encode"),
        (lambda m, p: vlmprune.parse("downsample@9+fastv@2"), SpecError, "write it alone"),
        (lambda m, p: vlmprune.parse("var+downsample@9"), SpecError, "write it alone"),
        (lambda m, p: vlmprune.parse("mmr+downsample@9"), SpecError, "has none"),
        (lambda m, p: vlmprune.encode(m, p, noise(0), "x", prune="downsample"), SpecError, "no budget"),
        (
            lambda m, p: vlmprune.encode(m, p, noise(0), "x", prune="downsample@9/crop"),
            SpecError,
            "drop '/crop'",
        ),
        (
            lambda m, p: vlmprune.encode(m, p, noise(0), "x", prune="fastervlm@9"),
            SpecError,
            "inside the model",
        ),
    ],
)
def test_it_is_refused_with_what_to_write_instead(call, error, reason):
    with pytest.raises(error, match=reason):
        call(*tiny_bundle("qwen2_vl"))


def dense_of(family: str, picture: Image.Image) -> int:
    """Tokens that the model reads of a picture, newlines not counted."""
    model, processor = tiny_bundle(family)
    with torch.no_grad(), vlmprune.prune(model, "dense") as run:
        model(**vlmprune.encode(model, processor, picture, "what?"))
        return sum(run.last.dense_tokens)


TILED = ["llava_next", "llava_onevision", pytest.param("llava_next_video", marks=pytest.mark.slow)]


@pytest.mark.parametrize("family", TILED)
def test_of_tiles_as_many_are_left_as_the_budget_allows(family):
    model, processor = tiny_bundle(family)
    picture = noise(0, 260, 410)
    adapter, read = adapter_for(model), {}
    whole, least = dense_of(family, picture), 10**9
    for keep in range(1, whole + 2):
        try:
            shrunk = shrink_for(adapter, processor, f"downsample@{keep}")([picture])
        except SpecError as error:
            # nothing is within the budget
            assert f"{keep} tokens are asked of a picture of 410 x 260" in str(error)
            assert keep < least
            continue
        least = min(least, keep)
        assert shrunk.dense == (whole,) and shrunk.tokens[0] <= keep
        read[shrunk.tokens[0]] = shrunk.images[0]
    assert len(read) > 1 and max(read) == whole and min(read) == least
    for tokens, small in read.items():
        assert dense_of(family, small) == tokens
        # the shape of the picture stays, but for rounding
        assert abs(small.width * 260 - small.height * 410) <= 410
    assert read[whole].size == picture.size
    with pytest.raises(SpecError, match=f"{least} at least, in tiles of one size.*pool"):
        shrink_for(adapter, processor, "downsample@1")([picture])


@pytest.mark.parametrize("family", TILED)
def test_smaller_tiles_answer_as_a_picture_made_smaller_by_hand(family):
    model, processor = tiny_bundle(family)
    samples = [sample(0, "3"), sample(1), sample(2, "4")]
    share = 0.9
    records = {r.id: r for r in evaluate(model, processor, samples, [f"downsample@{share}"], Easy())}
    picture = noise(3, 200)
    made = entrant(model, processor, f"downsample@{share}").shrink([picture])
    assert records["s0"].dense_tokens == dense_of(family, picture) == made.dense[0]
    assert records["s0"].realised_tokens == made.tokens[0] == dense_of(family, made.images[0])
    assert made.tokens[0] <= share * made.dense[0] and records["s1"].realised_tokens == 0
    # of several images LLaVA-OneVision makes one crop each
    (both,) = evaluate(model, processor, [sample(0, "3", "0")], ["downsample@1.0"], Easy())
    assert both.realised_tokens == both.dense_tokens > 0
    if family == "llava_onevision":
        assert both.dense_tokens == 2 * adapter_for(model).side ** 2
        with pytest.raises(SpecError, match="36 at least"):
            list(evaluate(model, processor, [sample(0, "3", "0")], ["downsample@0.9"], Easy()))


@pytest.mark.parametrize("family", ["mistral3", "gemma4"])
def test_other_families_of_any_size_make_exactly_so_many_tokens(family):
    model, processor = tiny_model(family), of_any_size(family)
    adapter = adapter_for(model)
    side = adapter.resolution(processor).side
    picture = noise(1, 11 * side, 14 * side)
    for keep in ("7", "20", "0.5", "1.0"):
        made = shrink_for(adapter, processor, f"downsample@{keep}")([picture])
        (whole,), (tokens,) = made.dense, made.tokens
        assert tokens <= Budget.of(keep).count(whole)
        # as the processor says it
        sides = {"patch_size": side} if family == "mistral3" else {}
        options = {**sides, **made.options.get("images_kwargs", {})}
        images = processor.image_processor(images=made.images, return_tensors="pt", **options)
        if family == "gemma4":
            assert int(images["num_soft_tokens_per_image"][0]) == tokens
        else:
            height, width = map(int, images["image_sizes"][0])
            assert height // side * (width // side) == tokens
        # and the model reads it
        with torch.no_grad():
            encoded = adapter.inner.get_image_features(
                **{name: images[name] for name in images if name in ENCODED[family]}
            )
        found = encoded.pooler_output if hasattr(encoded, "pooler_output") else encoded
        assert sum(len(one) for one in ([found] if torch.is_tensor(found) else found)) == tokens


ENCODED = {"mistral3": ("pixel_values", "image_sizes"), "gemma4": ("pixel_values", "image_position_ids")}


def of_any_size(family: str) -> Any:
    """What of a processor says how it makes tokens."""
    vision = tiny_model(family).config.vision_config
    if family == "gemma4":
        images = transformers.Gemma4ImageProcessor(
            patch_size=vision.patch_size, pooling_kernel_size=vision.pooling_kernel_size, max_soft_tokens=70
        )
        return SimpleNamespace(image_processor=images)
    patch, merge = vision.patch_size, tiny_model(family).config.spatial_merge_size
    images = transformers.PixtralImageProcessor(
        patch_size={"height": patch, "width": patch}, size={"longest_edge": 10 * patch * merge}
    )
    return SimpleNamespace(image_processor=images, patch_size=patch, spatial_merge_size=merge)


def test_only_families_of_any_size_are_compared_with_it_unasked():
    answers = {name: reads_any_size(name) for name in ("llava_next", "qwen2_vl", "gemma4", "mistral3")}
    assert answers == {"llava_next": False, "qwen2_vl": True, "gemma4": True, "mistral3": True}


@pytest.mark.parametrize("family", ["llava", "vipllava"])
def test_a_family_of_one_size_is_refused_by_name_before_the_first_question(family):
    reason = f"{family} reads pictures, or tiles of them, at one size.*pool@64'$"  # and no other model
    with pytest.raises(UnsupportedError, match=reason):
        evaluate(*tiny_bundle(family), [sample(0, "0")], ["downsample@9"], Easy())


def test_run_asks_about_the_shrunk_picture_and_counts_beside_the_dense_one(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "load", lambda *given: tiny_bundle("qwen2_vl"))
    noise(0).save(tmp_path / "noise.png")
    words = ["run", str(tmp_path / "noise.png"), "what?", "--model", "qwen", "--prune", "downsample@6"]
    made = CliRunner().invoke(app, [*words, "--max-new-tokens", "2", "--json"])
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["visual_tokens"] == {"dense": [24], "pruned": [6]}
    assert found["sequence"]["dense"] - found["sequence"]["pruned"] == 18
    assert found["tokens_per_layer"] == [6.0] * 4
    drawn = CliRunner().invoke(app, [*words, "--draw", str(tmp_path / "kept.png")])
    assert drawn.exit_code == 2 and "chooses no tokens" in " ".join(drawn.output.split())
