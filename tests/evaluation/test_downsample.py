# SPDX-License-Identifier: Apache-2.0
"""The baseline that shrinks the picture: its sizes, its answers in an evaluation, and where it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
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
from vlmprune.models import loading
from vlmprune.testing.tiny import tiny_bundle

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


@pytest.mark.parametrize("family", ["llava", "llava_next", "internvl"])
def test_a_family_of_one_size_is_refused_by_name_before_the_first_question(family):
    with pytest.raises(
        UnsupportedError, match=f"{family} reads pictures, or tiles of them, at one size.*pool"
    ):
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
