# SPDX-License-Identifier: Apache-2.0
"""Evaluation: one encoding of every image serves all specs, and changes no answer."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from PIL import Image

import vlmprune
from vlmprune.errors import EvaluationError, SpecError
from vlmprune.evaluation.answer.batch import Batch, model_inputs
from vlmprune.evaluation.answer.evaluate import evaluate
from vlmprune.evaluation.answer.record import Record
from vlmprune.evaluation.tasks.registry import get_task, list_tasks
from vlmprune.evaluation.tasks.sample import Sample
from vlmprune.hooks.session import Session
from vlmprune.registry import attachable_methods, get
from vlmprune.testing.checks_model import snapshot
from vlmprune.testing.conformance import default_spec
from vlmprune.testing.tiny import LLAVA_FAMILIES, tiny_bundle

METHODS = [
    name
    for name in attachable_methods()
    if get(name).__module__.startswith("vlmprune.") and not get(name).clips
    if name not in ("visionselector", "rcp")  # need trained weights
]
WORDS = 4


@dataclass(frozen=True)
class Plain(Sample):
    """A sample with pictures made of noise, each of another size; the mask is the left half."""

    seeds: tuple[int, ...] = field(default=())

    def load_images(self) -> list[Image.Image]:
        return [_noise(seed, 84 + 20 * (seed % 3), 84 + 30 * (seed % 2)) for seed in self.seeds]

    def object_masks(self) -> list[np.ndarray]:
        masks = [np.zeros(image.size[::-1], dtype=bool) for image in self.load_images()]
        for mask in masks:
            mask[:, : mask.shape[1] // 2] = True
        return masks


def _noise(seed: int, *size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


class Odd:
    """A task in which the number of letters decides."""

    def score(self, sample: Sample, answer: str) -> float:
        return float(len(answer) % 2)


def plain(number: int, seeds: tuple[int, ...]) -> Plain:
    return Plain(
        id=f"s{number}",
        cluster=f"c{seeds}",
        family="noise",
        group="general",
        question="what" + " is it" * (number % 3) + "?",
        answers=("x",),
        history=(("and that?", "no"),) * (number % 2),
        images=tuple(f"i{seed}" for seed in seeds),
        seeds=seeds,
    )


SAMPLES = [plain(number, seeds) for number, seeds in enumerate([(0,), (1,), (0,), (), (2, 0), (1,), (2, 0)])]


def chosen(record: Record) -> Any:
    """All of a record that must not depend on how it was computed."""
    kept = [one.keep_idx.tolist() for one in record.keep]
    counts = (
        record.dense_tokens,
        record.realised_tokens,
        record.layer_tokens,
        record.on_object,
        record.score,
    )
    return record.spec, record.id, record.answer, kept, counts


def run(
    model: Any, processor: Any, specs: list[str], samples: list[Sample] = SAMPLES, **options: Any
) -> list[Record]:
    return list(evaluate(model, processor, samples, specs, Odd(), max_new_tokens=WORDS, **options))


SERVED = [
    # a third of the methods for each family, not the same ones; the slow suite has the others
    pytest.param(family, name, marks=() if crc32(f"{family} {name}".encode()) % 3 == 0 else pytest.mark.slow)
    for family in ("llava", "llava_next")
    for name in METHODS
]


@pytest.mark.parametrize(("family", "name"), SERVED)
def test_served_images_give_what_generate_gives_one_by_one(family: str, name: str) -> None:
    """Every method: answers and keep maps of a batch equal those of each sample alone."""
    model, processor = tiny_bundle(family)
    specs = [default_spec(name)]
    records = {(r.spec, r.id): r for r in run(model, processor, specs, batch_size=5)}
    assert len(records) == len(specs) * len(SAMPLES)
    for spec in specs:
        for sample in SAMPLES:
            text = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
            inputs = model_inputs(processor, model, [text], [sample.load_images()])
            with vlmprune.prune(model, spec) as session:
                ids = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False)
            answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[
                0
            ].strip()
            record, report = records[session.spec, sample.id], session.last
            assert record.answer == answer, session.spec
            assert [k.keep_idx.tolist() for k in record.keep] == [k.keep_idx.tolist() for k in report.keep]
            assert (record.dense_tokens, record.realised_tokens) == (
                sum(report.dense_tokens),
                sum(report.realised_tokens),
            )
            assert record.layer_tokens == pytest.approx(sum(report.tokens_per_layer) / 4 * len(sample.images))
            encoding = "each" if session.in_tower else "shared"
            assert record.encoding == (encoding if sample.images else "none")


@pytest.mark.parametrize("family", LLAVA_FAMILIES)
def test_sharing_changes_nothing(family: str) -> None:
    model, processor = tiny_bundle(family)
    specs = ["dense", "uniform@9", "divprune@5/crop", "pool@9", "fastv@9"]
    shared, each = (run(model, processor, specs, batch_size=4, share=share) for share in (True, False))
    assert list(map(chosen, shared)) == list(map(chosen, each))
    assert {r.encoding for r in shared} == {"shared", "none"} and {r.encoding for r in each} == {
        "each",
        "none",
    }


def test_the_tower_sees_every_image_once() -> None:
    model, processor = tiny_bundle("llava")
    seen = []
    watch = model.model.vision_tower.register_forward_hook(
        lambda module, args, output: seen.append(len(output[0]))
    )
    run(
        model,
        processor,
        ["dense", "fastervlm@9", "fastervlm(layer=1)@9", "zooprune@9", "fastv@9"],
        batch_size=3,
    )
    watch.remove()
    assert sum(seen) == 4  # images 0 and 1, and the pair (2, 0), which another model might encode together


def test_a_family_that_returns_more_than_features_encodes_for_each_spec_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = tiny_bundle("llava")
    usual = run(model, processor, ["dense", "fastervlm@9"])
    encode = type(model.model).get_image_features

    @functools.wraps(encode)
    def deeper(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = encode(self, *args, **kwargs)
        output["deepstack_features"] = []
        return output

    monkeypatch.setattr(type(model.model), "get_image_features", deeper)
    records = run(model, processor, ["dense", "fastervlm@9"])
    assert list(map(chosen, records)) == list(map(chosen, usual))
    assert {r.encoding for r in records} == {"each", "none"}


def test_batches_follow_each_other_and_specs_within_them_fewest_images_first() -> None:
    records = run(*tiny_bundle("llava"), ["dense", "random@9"], batch_size=4)
    first, second = ["s3", "s0", "s1", "s2"], ["s5", "s4", "s6"]
    assert [r.id for r in records] == first * 2 + second * 2
    assert [r.spec for r in records] == ["dense"] * 4 + ["random@9"] * 4 + ["dense"] * 3 + ["random@9"] * 3


def test_tokens_are_counted_as_computed() -> None:
    records = run(*tiny_bundle("llava"), ["dense", "random@9", "fastv(layer=2)@9"], SAMPLES[3:5])
    counts = {(r.spec, r.id): (r.dense_tokens, r.realised_tokens, r.layer_tokens) for r in records}
    assert counts["dense", "s4"] == (72, 72, 72)  # two images
    assert counts["random@9", "s4"] == (72, 18, 18)
    assert counts["fastv(layer=2)@9", "s4"] == (72, 18, (72 + 72 + 18 + 18) / 4)
    assert all(
        counts[spec, "s3"] == (0, 0, 0) for spec in ("dense", "random@9", "fastv(layer=2)@9")
    )  # text only


def test_records_tell_what_happened_and_survive_a_journal() -> None:
    records = run(*tiny_bundle("llava"), ["fastervlm@9"], positions="original")
    assert all(r.firings > 0 for r in records if r.keep) and [r.firings for r in records if not r.keep] == [0]
    assert {r.positions for r in records} == {"original"} and {r.batch for r in records} == {7}
    for r in records:
        assert (
            0 <= r.seconds["choosing"] <= r.seconds["first_token"] <= r.seconds["total"]
            and r.seconds["encode"] > 0
        )
        assert Record.read(json.loads(json.dumps(r.line(keep=True)))) == r
        assert "keep" not in r.line()
        assert [one["keep_idx"] for one in r.line(keep=True)["keep"]] == [
            one.keep_idx.tolist() for one in r.keep
        ]
    assert Record.read({**records[0].line(), "answer": "", "error": None}).empty


def test_the_share_on_the_object_counts_kept_patches() -> None:
    (dense,) = run(*tiny_bundle("llava"), ["dense"], SAMPLES[:1])
    assert dense.on_object == 0.5  # the left half of a square
    (cut,) = run(*tiny_bundle("llava"), ["random@9"], SAMPLES[:1])
    left = [int(index) for index in cut.keep[0].keep_idx if index % 6 < 3]
    assert cut.on_object == len(left) / 9 and 0 < len(left) < 9
    nothing = replace(SAMPLES[0], seeds=(), images=())
    assert run(*tiny_bundle("llava"), ["random@9"], [nothing])[0].on_object is None


# --- nothing is left, nothing is hidden -----------------------------------------------------------


def test_the_model_is_left_as_it_was_also_half_way() -> None:
    model, processor = tiny_bundle("llava")
    run(model, processor, ["dense"])  # transformers leaves hooks of its own behind, once
    before = snapshot(model)
    records = evaluate(
        model, processor, SAMPLES, ["fastervlm@9", default_spec("var") + "+fastv@9"], Odd(), batch_size=2
    )
    next(records)
    assert snapshot(model) == before  # between two records
    records.close()
    assert snapshot(model) == before


def test_a_failed_generation_is_an_error_not_an_empty_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_bundle("llava")
    run(model, processor, ["dense"])
    before = snapshot(model)
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: 1 / 0)
    with pytest.raises(
        EvaluationError,
        match=r"uniform@9: generation failed on the 7 samples 's3' to 's6': ZeroDivisionError",
    ):
        run(model, processor, ["uniform@9"])
    monkeypatch.undo()
    assert snapshot(model) == before


def test_hooks_that_do_not_fire_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_bundle("llava")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "attach", lambda self: self)
        with pytest.raises(EvaluationError, match="no hook fired"):
            run(model, processor, ["uniform@9"])
    with monkeypatch.context() as patch:
        patch.setattr(
            "vlmprune.hooks.slots.before_lm.cut_pictures",
            lambda pictures, *rest, **options: [None] * len(pictures),
        )
        with pytest.raises(EvaluationError, match="nothing was cut"):
            run(model, processor, ["uniform@9"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"specs": []}, "at least one"),
        ({"specs": ["dense", "uniform@9", "uniform@9"]}, r"each once, not \['uniform@9'\]"),
        ({"batch_size": 0}, "batch_size=0; expected an int >= 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
    ],
)
def test_arguments_are_checked_before_anything_runs(change: dict[str, Any], message: str) -> None:
    model, processor = tiny_bundle("llava")
    with pytest.raises(EvaluationError, match=message):
        evaluate(model, processor, SAMPLES, **{"specs": ["dense"], "task": Odd(), **change})
    with pytest.raises(SpecError, match="fastervlm"):
        evaluate(model, processor, SAMPLES, ["fastervml@9"], Odd())
    with pytest.raises(EvaluationError, match=r"model\.eval"):
        evaluate(tiny_bundle("llava")[0].train(), processor, SAMPLES, ["dense"], Odd())
    processor.chat_template = None
    with pytest.raises(EvaluationError, match="LlavaProcessor has no chat template"):
        evaluate(model, processor, SAMPLES, ["dense"], Odd())


def test_samples_and_tasks_that_are_wrong_are_named() -> None:
    model, processor = tiny_bundle("llava")

    class Broken(Plain):
        def load_images(self) -> list[Image.Image]:
            raise OSError("no such file")

    with pytest.raises(EvaluationError, match="s9: its images cannot be loaded: OSError: no such file"):
        run(model, processor, ["dense"], [Broken(**{**vars(plain(9, (0,)))})])
    with pytest.raises(EvaluationError, match="s0 names 2 images and loads 1"):
        run(model, processor, ["dense"], [replace(SAMPLES[0], images=("a", "b"))])

    class Percent:
        def score(self, sample: Sample, answer: str) -> int:
            return 100

    with pytest.raises(EvaluationError, match="s3: the task gave the score 100"):
        list(evaluate(model, processor, SAMPLES, ["dense"], Percent()))


def test_tasks_have_names() -> None:
    assert "shapes" in list_tasks() and get_task("shapes").name == "shapes"
    with pytest.raises(
        EvaluationError, match=r"task 'shape' is unknown; expected one of .*Did you mean 'shapes'\?"
    ):
        get_task("shape")


def test_a_batch_is_padded_on_the_left_and_counts_its_images() -> None:
    model, processor = tiny_bundle("llava")
    batch = Batch.make(SAMPLES, processor, model)
    assert [list(p) for p in batch.pictures] == [[0], [1], [2], [], [3, 4], [5], [6, 7]]
    mask = batch.inputs["attention_mask"]
    assert bool(mask[:, -1].all()) and not bool(mask[:, 0].all())
    assert batch.inputs["pixel_values"].shape[0] == 8 and batch.inputs["pixel_values"].dtype == torch.float32
