# SPDX-License-Identifier: Apache-2.0
"""The benchmark of clips: reproducible, balanced, true of what is drawn, and answered as clips."""

from __future__ import annotations

import base64
import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlmprune.errors import EvaluationError, SpecError
from vlmprune.evaluation.answer.evaluate import evaluate
from vlmprune.evaluation.report.gallery import Answer, Kept, _strips
from vlmprune.evaluation.tasks.clips import clips
from vlmprune.evaluation.tasks.clips.story import FAMILIES, FRAMES
from vlmprune.evaluation.tasks.registry import get_task
from vlmprune.evaluation.tasks.sample import shows_clips
from vlmprune.evaluation.tasks.shapes.vocabulary import PLURALS
from vlmprune.testing.tiny import tiny_bundle

TASK = clips()
RECORDED = [
    ("what color is the cross ?", "red"),
    ("is there a purple square ?", "yes"),
    ("what color is the bar ?", "red"),
    ("how many triangles are there ?", "1"),
    ("what color is the square in the last frame ?", "red"),
    ("where is the cyan bar in the last frame ?", "top left"),
    ("which comes first , the yellow cross or the white triangle ?", "yellow cross"),
]
SINGULAR = {plural: shape for shape, plural in PLURALS.items()}


@pytest.fixture(scope="module")
def samples():
    return TASK.samples("test", 7 * 24)


def of(samples, family):
    return [sample for sample in samples if sample.family == family]


def seen(sample):
    """Per frame the (colour, shape) of what is there."""
    return [[(thing.color, thing.shape) for thing in scene.things] for scene in sample.story.frames]


def test_it_is_a_task_of_clips():
    assert get_task("clips") == TASK and shows_clips(TASK) and not shows_clips(get_task("shapes"))
    assert set(TASK.blind) == set(TASK.families) == set(TASK.groups)


def test_samples_do_not_depend_on_what_else_is_drawn(samples):
    for i in (0, 8, 93, 167):
        alone = TASK.sample("test", TASK.families[i % 7], i // 7)
        assert alone == samples[i] and alone.story == samples[i].story
        for one, other in zip(alone.load_images(), samples[i].load_images(), strict=True):
            assert one.tobytes() == other.tobytes()
    assert TASK.samples("test", 20) == samples[:20]
    assert len({sample.id for sample in samples}) == len(samples)
    stories = {sample.story for sample in samples}
    assert stories.isdisjoint(sample.story for sample in TASK.samples("train", 70))


def test_the_recorded_version_asks_the_same(samples):
    assert [(sample.question, sample.answers[0]) for sample in samples[:7]] == RECORDED


def test_equal_clusters_show_equal_clips(samples):
    shown = {}
    for sample in samples:
        assert shown.setdefault(sample.cluster, sample.story.frames) == sample.story.frames
    pairs = of(samples, "moment")
    assert len({sample.cluster for sample in pairs}) * 2 == len(pairs)
    assert [sample.answers[0] for sample in pairs] == ["yes", "no"] * (len(pairs) // 2)


@pytest.mark.parametrize("family", [one for one in FAMILIES if one.name != "order"], ids=lambda one: one.name)
def test_answers_are_equally_frequent(samples, family):
    found = Counter(sample.answers[0] for sample in of(samples, family.name))
    assert set(found) == set(family.answers) and len(set(found.values())) == 1


def test_some_things_stand_still_in_every_clip(samples):
    for sample in samples:
        always = set.intersection(
            *({(t.shape, t.x, t.y, t.rgb) for t in s.things} for s in sample.story.frames)
        )
        assert len(always) >= 2
        names = [shape for shape, *_ in always]
        assert len(set(names)) == len(names)


def test_answers_are_true(samples):
    """Told anew from what is in every frame and from the words of the question."""
    for sample in samples:
        words, frames, answer = sample.question.split(), seen(sample), sample.answers[0]
        if sample.family in ("still", "appear", "change"):
            colors = [[color for color, shape in frame if shape == words[4]] for frame in frames]
            assert colors[-1] == [answer]
            steady = [one == [answer] for one in colors]
            first = {"still": [answer], "appear": []}.get(sample.family, colors[0])
            assert colors[0] == first and (sample.family != "change" or colors[0] != [answer])
            assert steady == sorted(steady)  # once it is there, it stays
        elif sample.family == "moment":
            holding = sum((words[3], words[4]) in frame for frame in frames)
            assert holding == (answer == "yes")
        elif sample.family == "count":
            shape = SINGULAR[words[2]]
            assert sum(name == shape for frame in frames for _, name in frame) == int(answer)
            assert all(sum(name == shape for _, name in frame) <= 1 for frame in frames)
        elif sample.family == "move":
            path = [next(t for t in s.things if t.shape == words[4]) for s in sample.story.frames]
            assert " ".join(path[-1].place()) == answer != " ".join(path[0].place())
            steps = np.diff([(t.x, t.y) for t in path], axis=0)
            assert np.allclose(steps, steps[0]) and np.abs(steps).max() > 1
        else:
            named = [tuple(words[i : i + 2]) for i in (5, 9)]
            came = [next(t for t, frame in enumerate(frames) if one in frame) for one in named]
            assert answer == " ".join(named[came.index(min(came))]) and came[0] != came[1]


def test_which_comes_first_is_named_first_as_often_as_second(samples):
    first = [sample.question.split()[5:7] == sample.answers[0].split() for sample in of(samples, "order")]
    assert sum(first) * 2 == len(first)


def test_masks_lie_on_what_is_asked_about_and_the_rest_only_flickers(samples):
    for sample in samples[:14]:
        images, masks = sample.load_images(), sample.object_masks()
        assert len(images) == len(masks) == len(sample.images) == FRAMES
        asked = [bool(mask.any()) for mask in masks]
        assert any(asked) and asked == [bool(one) for one in sample.story.asked]
        pixels = np.stack([np.asarray(image, dtype=float) for image in images])
        anyone = np.any(masks, axis=0)
        change = np.abs(np.diff(pixels, axis=0)).mean(axis=-1)
        if sample.family not in ("change",):
            assert change[:, ~anyone].mean() < 5  # noise, and what is anti-aliased at edges
        if sample.family in ("moment", "appear", "count", "move", "order"):
            assert change[:, anyone].max() > 40


def test_a_wrong_split_or_limit_is_refused():
    with pytest.raises(SpecError, match=r"split 'tset' of clips.*Did you mean 'test'"):
        TASK.samples("tset")
    with pytest.raises(SpecError, match="limit=0 samples of clips/test; expected 1 to 2800"):
        TASK.samples(limit=0)


def test_methods_for_clips_answer_it_and_spend_the_budget_on_each_clip():
    model, processor = tiny_bundle("llava")
    specs = ["dense", "evs@0.25", "random@40", "uniform(whole=true)@0.25"]
    found = list(evaluate(model, processor, TASK.samples("test", 3), specs, TASK, batch_size=3))
    assert {(r.spec, r.dense_tokens, r.realised_tokens) for r in found} == {
        ("dense", 288, 288),
        ("evs@0.25", 288, 72),
        ("random@40", 288, 40),
        ("uniform(whole=True)@0.25", 288, 72),
    }
    assert all(len(record.keep) == FRAMES for record in found)


def test_the_gallery_shows_a_clip_as_one_strip(samples):
    images = samples[0].load_images()
    keep = tuple(Kept(tuple(range(t)), ((12, 12),), "center") for t in range(FRAMES))
    answer = Answer(samples[0].id, "still", "red", 1.0, 28, 1152, None, keep)
    (shown,) = _strips(images, answer, False)
    before, after = (
        Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in (shown.before, shown.after)
    )
    assert before.size == after.size and before.width > 4 * 144 > before.height
    assert np.asarray(after, dtype=float).mean() < np.asarray(before, dtype=float).mean()  # dropped is dark
    with pytest.raises(EvaluationError, match="shows 7 images, its journal has kept patches of 8"):
        list(_strips(images[:7], answer, False))
