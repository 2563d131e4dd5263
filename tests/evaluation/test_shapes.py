# SPDX-License-Identifier: Apache-2.0
"""The synthetic benchmark: reproducible samples, balanced and true answers, masks that cover."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import PIL
import pytest
import yaml
from PIL import Image, ImageFilter

from vlmprune.errors import SpecError
from vlmprune.evaluation.tasks.sample import GROUPS, exact, normalise
from vlmprune.evaluation.tasks.shapes import shapes
from vlmprune.evaluation.tasks.shapes.dataset import PER_FAMILY, draw
from vlmprune.evaluation.tasks.shapes.render import mask, render
from vlmprune.evaluation.tasks.shapes.scene import CANVAS
from vlmprune.evaluation.tasks.shapes.vocabulary import COLORS, PLURALS, SIZES

TASK = shapes()
SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
GOLDEN = Path(__file__).with_name("shapes_golden.yaml")


@pytest.fixture(scope="module")
def samples():
    return TASK.samples("test", 480)


def by_family(samples, family):
    return [sample for sample in samples if sample.family == family]


# --- reproducible ---------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_what_else_is_drawn(samples):
    for i in (0, 17, 305, 479):
        alone = TASK.sample("test", TASK.families[i % 10], i // 10)
        assert alone == samples[i] and alone.scenes == samples[i].scenes
        assert [a.tobytes() for a in alone.load_images()] == [b.tobytes() for b in samples[i].load_images()]


def test_a_limit_is_a_balanced_prefix(samples):
    few = TASK.samples("test", 43)
    assert few == samples[:43]
    assert set(Counter(sample.family for sample in few).values()) == {4, 5}


def test_the_size_of_the_test_split():
    assert len(TASK.families) == 10
    assert PER_FAMILY["test"] >= 400 and PER_FAMILY["test"] * 10 >= 4000


def test_ids_are_unique_and_clusters_are_images(samples):
    assert len({sample.id for sample in samples}) == len(samples)
    images = {}
    for sample in samples:
        assert images.setdefault(sample.cluster, sample.scenes) == sample.scenes
        assert len(sample.images) == len(sample.scenes)


def test_splits_share_no_scene(samples):
    seen = {scene for sample in samples for scene in sample.scenes}
    for split in ("train", "dev"):
        assert seen.isdisjoint(scene for sample in TASK.samples(split, 200) for scene in sample.scenes)


def test_pictures_are_those_of_the_recorded_version(samples):
    golden = yaml.safe_load(GOLDEN.read_text())
    for sample_id, record in golden["samples"].items():
        split, family, index = sample_id.split("-")[1:]
        image = np.asarray(TASK.sample(split, family, int(index)).load_images()[0])
        means = image.reshape(12, 12, 12, 12, 3).mean((1, 3, 4))
        # another Pillow may draw an edge or a glyph otherwise, not the scene
        assert np.abs(means - np.array(record["patch_means"])).max() < 6, sample_id
        if PIL.__version__ == golden["pillow"]:
            assert hashlib.sha256(image.tobytes()).hexdigest() == record["sha256"], sample_id


def test_the_fingerprint_is_recorded():
    assert TASK.fingerprint == yaml.safe_load(GOLDEN.read_text())["fingerprint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tset",), "did you mean 'test'"), (("test", 0), "limit=0"), (("dev", 10**6), "limit")],
)
def test_a_wrong_request_is_an_error(arguments, message):
    with pytest.raises(SpecError, match=f"(?i){message}"):
        TASK.samples(*arguments)


# --- balanced -------------------------------------------------------------------------------------


# drawing the pictures of a needle takes as long as those of all other families
GUESSED = [
    pytest.param(family, marks=pytest.mark.slow) if family == "needle" else family for family in TASK.families
]


@pytest.mark.parametrize("family", GUESSED)
def test_a_guesser_scores_what_is_stated(family):
    answers = defaultdict(Counter)
    for index in range(PER_FAMILY["test"]):
        question = draw(303, family, index)[0]
        answers[question.template][question.answer] += 1
    total = sum(sum(counts.values()) for counts in answers.values())
    best = sum(max(counts.values()) for counts in answers.values()) / total
    # strings are drawn, everything else is dealt in turns
    slack = 0.02 if family == "text" else 0.015
    assert TASK.blind[family] - 1e-9 <= best <= TASK.blind[family] + slack


@pytest.mark.parametrize("family", ["exist", "spatial", "compare"])
def test_yes_and_no_are_asked_about_the_same_image(samples, family):
    clusters = defaultdict(set)
    for sample in by_family(samples, family):
        clusters[sample.cluster].add(sample.answers)
    assert all(answers == {("yes",), ("no",)} for answers in clusters.values())


def test_absent_things_are_mostly_made_of_present_words(samples):
    crossed = []
    for sample in by_family(samples, "exist"):
        if sample.answers == ("no",):
            color, shape = sample.question.split()[3:5]
            things = sample.scenes[0].things
            crossed.append(any(t.color == color for t in things) and any(t.shape == shape for t in things))
    assert np.mean(crossed) > 0.6


# --- true -----------------------------------------------------------------------------------------


def centre(thing):
    y, x = np.nonzero(mask((thing,)))
    return x.mean(), y.mean()


def where(thing):
    x, y = centre(thing)
    return f"{'top' if y < CANVAS / 2 else 'bottom'} {'left' if x < CANVAS / 2 else 'right'}"


def answer(question, history, scenes):
    """Read the question as a person would and look it up in the scene; places are measured in the masks."""
    if found := re.fullmatch(r"in the (first|second) image , (.*)", question):
        return answer(found[2], (), [scenes[found[1] == "second"]])
    if found := re.fullmatch(r"which image has an? (\w+) (\w+) \?", question):
        has = [any((t.color, t.shape) == (found[1], found[2]) for t in scene.things) for scene in scenes]
        assert sum(has) == 1
        return ("first", "second")[has.index(True)]
    things = scenes[0].things
    if " it ?" in question:
        words = history[-1][0].split()
        name = words[-3:-1] if words[-3] != "the" else words[-2:-1]
        return answer(question.replace("it ?", f"the {' '.join(name)} ?"), (), scenes)
    if found := re.fullmatch(r"is there an? (\w+) (\w+) \?", question):
        return "yes" if any((t.color, t.shape) == found.groups() for t in things) else "no"
    if found := re.fullmatch(r"how many (?:(\w+) objects|(\w+)) are there \?", question):
        return str(sum(t.color == found[1] if found[1] else t.shape == SINGULAR[found[2]] for t in things))
    if found := re.fullmatch(r"is the (\w+ \w+) (\w+ of|above|below|\w+ than) the (\w+ \w+) \?", question):
        a, b = only(found[1], things), only(found[3], things)
        (ax, ay), (bx, by) = centre(a), centre(b)
        holds = {
            "left of": ax < bx,
            "right of": ax > bx,
            "above": ay < by,
            "below": ay > by,
            "larger than": a.radius > b.radius,
            "smaller than": a.radius < b.radius,
        }
        return "yes" if holds[found[2]] else "no"
    if found := re.fullmatch(r"what (?:number is on the (\w+) sign|does the (\w+) sign say) \?", question):
        return "".join(only((found[1] or found[2]) + " sign", things).text).lower()
    found = re.fullmatch(r"(?:what (\w+) is|(where) is) the ([\w ]+) \?", question)
    thing = only(found[3], things)
    return where(thing) if found[2] else getattr(thing, found[1])


def only(name, things):
    """The one thing of this name: "red circle", "red object", "circle"."""
    words = [word for word in name.split() if word != "object"]
    fits = [t for t in things if all(word in (t.color, t.shape) for word in words)]
    assert len(fits) == 1, (name, things)
    return fits[0]


@pytest.mark.parametrize("family", TASK.families)
def test_answers_are_true_of_the_scene(samples, family):
    for sample in by_family(samples, family):
        assert sample.answers == (answer(sample.question, sample.history, sample.scenes),), sample
        for question, reference in sample.history:
            assert reference == answer(question, (), sample.scenes)


def test_two_images_would_give_different_answers(samples):
    for sample in by_family(samples, "multi_image"):
        if sample.question.endswith("?") and "is there" in sample.question:
            other = sample.scenes[::-1]
            assert answer(sample.question, (), other) != sample.answers[0]


def test_the_needle_is_small_and_alone_of_its_kind(samples):
    for sample in by_family(samples, "needle"):
        needle, *crowd = sample.scenes[0].things
        assert needle.size == "small"
        assert len(crowd) > 10, "fewer would all fit into a small budget"
        alike = [(thing.shape == needle.shape, thing.color == needle.color) for thing in crowd]
        assert (True, True) not in alike
        assert not any(shape for shape, _ in alike) or not any(color for _, color in alike), (
            "one of the two is its own"
        )


# --- masks ----------------------------------------------------------------------------------------


def test_a_mask_covers_the_thing_and_nothing_else(samples):
    for sample in samples[:150]:
        for image, area, scene in zip(
            sample.load_images(), sample.object_masks(), sample.scenes, strict=True
        ):
            assert area.shape == (CANVAS, CANVAS) and area.dtype == bool
            for thing in scene.things:
                body = mask((thing,))
                assert (body & area).sum() in (0, body.sum())  # asked about or not at all
                core = ImageFilter.MinFilter(3)
                inner = np.asarray(Image.fromarray(body).convert("L").filter(core)) > 0
                if inner.sum() > 10:  # thin rings are all edge
                    assert np.abs(np.median(np.asarray(image)[inner], axis=0) - thing.rgb).max() < 14, thing


def test_only_what_is_absent_has_no_mask(samples):
    for sample in samples[:300]:
        absent = sample.answers == ("no",) and "is there" in sample.question
        assert any(area.any() for area in sample.object_masks()) is not absent, sample


def test_things_do_not_overlap_and_lie_inside_the_frame(samples):
    for sample in samples[:100]:
        for scene in sample.scenes:
            left, top, right, bottom = scene.frame
            areas = [mask((thing,)) for thing in scene.things]
            assert sum(area.sum() for area in areas) == mask(scene.things).sum()
            inside = np.zeros((CANVAS, CANVAS), bool)
            inside[top:bottom, left:right] = True
            # a tilted corner may reach under a bar by a few pixels
            assert all(area[inside].sum() > 0.9 * area.sum() for area in areas)


def test_sizes_differ_in_pixels():
    radii = [radius for size in SIZES.values() for radius in size]
    assert radii == sorted(radii)
    assert len({tuple(rgb) for rgb in COLORS.values()}) == len(COLORS)


def test_letterbox_bars_are_drawn(samples):
    framed = [scene for sample in samples for scene in sample.scenes if scene.frame != (0, 0, CANVAS, CANVAS)]
    assert 0.15 < len(framed) / sum(len(sample.scenes) for sample in samples) < 0.35
    scene = framed[0]
    outside = np.ones((CANVAS, CANVAS), bool)
    left, top, right, bottom = scene.frame
    outside[top:bottom, left:right] = False
    assert np.abs(np.asarray(render(scene))[outside].mean(0) - scene.bars).max() < 8


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "compact", "expected"),
    [
        ("Red.", False, "red"),
        ("The  top-left!", False, "top left"),
        ("two", False, "2"),
        ("7 2 4", True, "724"),
        ("X K E", True, "xke"),
        ("A.", False, "a"),  # a choice, which is not the empty answer
        ("", False, ""),
    ],
)
def test_answers_are_normalised(given, compact, expected):
    assert normalise(given, compact=compact) == expected


def test_the_reference_scores_one_and_anything_else_zero(samples):
    for sample in samples[:60]:
        assert TASK.score(sample, sample.answers[0].upper() + ".") == exact(sample, sample.answers[0]) == 1.0
        assert TASK.score(sample, sample.answers[0] + " red") == TASK.score(sample, "") == 0.0


def test_groups(samples):
    assert set(TASK.groups.values()) == set(GROUPS)
    assert {sample.family for sample in samples if sample.group == "text"} == {"text"}


def test_a_conversation_shows_the_images_first(samples):
    two = by_family(samples, "multi_image")[0].messages()
    assert [part.get("text", "image") for part in two[0]["content"]][:4] == [
        "first",
        "image",
        "second",
        "image",
    ]
    turns = by_family(samples, "two_turn")[0].messages()
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"]
    assert [part["type"] for turn in turns for part in turn["content"]] == ["image", "text", "text", "text"]
