# SPDX-License-Identifier: Apache-2.0
"""The task: ten families, answers in equal shares, a sample for each (split, family, index)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from ....errors import SpecError
from ..sample import Sample, exact, in_turns, normalise
from .questions import FAMILIES, TEMPLATES, YES_NO, Question, Template
from .render import mask, render
from .scene import CANVAS, Scene, sample_scene
from .vocabulary import DIGITS, LETTERS, SIGN_LENGTH

VERSION = 3  # of everything that decides what a sample is
SEEDS = {"train": 101, "dev": 202, "test": 303}  # of the generators
PER_FAMILY = {"train": 2000, "dev": 100, "test": 480}
_TRIES = 1000  # scenes drawn until one fits


@dataclass(frozen=True)
class ShapesSample(Sample):
    """A sample with the scenes it shows and what they are asked about."""

    scenes: tuple[Scene, ...] = field(repr=False, default=())
    ask: Question | None = field(repr=False, default=None)

    def load_images(self) -> list[Image.Image]:
        return [render(scene) for scene in self.scenes]

    def object_masks(self) -> list[np.ndarray]:
        asked = self.ask.asked if self.ask else ()  # (image, thing) pairs
        return [
            mask(tuple(scene.things[i] for k, i in asked if k == image))
            for image, scene in enumerate(self.scenes)
        ]


@dataclass(frozen=True)
class ShapesTask:
    """Synthetic questions about coloured shapes and signs, drawn on the fly. Build one with ``shapes()``."""

    name: str = "shapes"
    families: tuple[str, ...] = FAMILIES

    @property
    def groups(self) -> Mapping[str, str]:
        return {family: "text" if family == "text" else "general" for family in self.families}

    @property
    def blind(self) -> Mapping[str, float]:
        """Expected score of the best constant answer per template; those of a family are equally frequent."""
        return {
            family: float(np.mean([_guess(t) for t in TEMPLATES if t.family == family]))
            for family in self.families
        }

    @cached_property
    def fingerprint(self) -> str:
        answers = [(t.family, t.name, t.kind, t.answers) for t in TEMPLATES]
        # VERSION stands for all that decides a sample and is not listed
        recipe = json.dumps([self.name, VERSION, SEEDS, PER_FAMILY, CANVAS, self.families, answers])
        return hashlib.sha256(recipe.encode()).hexdigest()[:16]

    def samples(self, split: str = "test", limit: int | None = None) -> list[ShapesSample]:
        """Samples of a split, families in turn: any ``limit`` is a balanced prefix of the whole."""
        dealt = in_turns(self.name, self.families, PER_FAMILY, split, limit)
        return [self.sample(split, family, index) for family, index in dealt]

    def sample(self, split: str, family: str, index: int) -> ShapesSample:
        """Sample ``index`` of a family: the same whatever else is drawn, on any shard."""
        question, scenes, cluster = draw(SEEDS[split], family, index)
        stem, group = f"{self.name}-{split}-{family}", self.groups[family]
        return ShapesSample(
            id=f"{stem}-{index}",
            cluster=f"{stem}-{cluster}",
            family=family,
            group=group,
            question=question.text,
            answers=(normalise(question.answer, compact=group == "text"),),
            history=tuple((turn.text, turn.answer) for turn in question.history),
            images=tuple(f"{stem}-{cluster}-{k}" for k in range(len(scenes))),
            scenes=scenes,
            ask=question,
        )

    def score(self, sample: Sample, answer: str) -> float:
        return exact(sample, answer)


def shapes() -> ShapesTask:
    """The benchmark that ships with the package."""
    return ShapesTask()


def _guess(template: Template) -> float:
    # share of right answers of who always says the same
    if template.answers:
        return 1 / len(template.answers)
    # half of the signs are digits, half are letters
    return (len(DIGITS) ** -SIGN_LENGTH + len(LETTERS) ** -SIGN_LENGTH) / 2


def draw(seed: int, family: str, index: int) -> tuple[Question, tuple[Scene, ...], int]:
    """A question, its scenes and the number of its image.

    Templates take turns, and so do the answers within a template. Yes and no are asked about the same image,
    so that what an image makes likely helps nobody.
    """
    # index 0, 1, ...: each template once, then each with its next answer
    templates = [template for template in TEMPLATES if template.family == family]
    template, turn = templates[index % len(templates)], index // len(templates)
    paired = template.answers == YES_NO
    cluster = index - len(templates) if paired and turn % 2 else index
    answers = (
        YES_NO if paired else (template.answers[turn % len(template.answers)] if template.answers else "",)
    )
    # by cluster and not by index: yes and no about one image must draw the same scene
    rng = np.random.default_rng([seed, FAMILIES.index(family), cluster])
    # until one scene fits all answers
    for _ in range(_TRIES):
        scenes = tuple(sample_scene(rng, template.kind) for _ in range(template.images))
        made = [template.make(scenes, rng, answer) for answer in answers]
        questions = [question for question in made if question is not None]
        if len(questions) == len(answers):
            return questions[turn % len(answers)], scenes, cluster
    raise SpecError(
        f"no scene for {family}/{template.name} in {_TRIES} tries; scenes leave too little room for it"
    )
