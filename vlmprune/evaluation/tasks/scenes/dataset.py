# SPDX-License-Identifier: Apache-2.0
"""The task: five families, answers in equal shares, a sample for each (split, family, index)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from ....errors import SpecError
from ..sample import Sample, exact, in_turns
from .paint import coverage, paint
from .questions import ANSWERS, FAMILIES, Question, questions_about
from .scene import CANVAS, LARGE, SMALL, SQUARE, Scene, Size, sample_scene

VERSION = 1  # of everything that decides what a sample is
SEEDS = {"train": 1101, "dev": 1202, "test": 1303}  # of the generators
PER_FAMILY = {"train": 2000, "dev": 200, "test": 600}
SIZES: tuple[Size, ...] = (SQUARE, (72, 120), (120, 72))  # of pictures of several shapes; areas are alike
_TRIES = 2000  # scenes drawn until one fits


@dataclass(frozen=True)
class ScenesSample(Sample):
    """A sample with the scene it shows and what it asks."""

    scene: Scene | None = field(repr=False, default=None)
    ask: Question | None = field(repr=False, default=None)

    def load_images(self) -> list[Image.Image]:
        return [Image.fromarray(paint(self.scene))] if self.scene else []

    def object_masks(self) -> list[np.ndarray]:
        if not self.scene or not self.ask:
            return []
        mask = np.zeros(self.scene.size, bool)
        for number in self.ask.asked:
            mask |= coverage(self.scene.things[number], self.scene.size) >= 0.5
        return [mask]


@dataclass(frozen=True)
class ScenesTask:
    """Questions about patterned things before a place, painted on the fly. Build one with ``scenes()``.

    Args:
        sizes: of the pictures; each has one of them, drawn at random.
    """

    name: str = "scenes"
    families: tuple[str, ...] = FAMILIES
    sizes: tuple[Size, ...] = (SQUARE,)

    @property
    def groups(self) -> Mapping[str, str]:
        return dict.fromkeys(self.families, "general")

    @property
    def blind(self) -> Mapping[str, float]:
        """Expected score of the best constant answer per form of question."""
        # half of the small things are asked for their colour, half for their pattern
        small = (1 / len(ANSWERS["color"]) + 1 / len(ANSWERS["pattern"])) / 2
        return {family: small if family == "small" else 1 / len(ANSWERS[family]) for family in self.families}

    @cached_property
    def fingerprint(self) -> str:
        # VERSION stands for all that decides a sample and is not listed
        recipe = [self.name, VERSION, SEEDS, PER_FAMILY, CANVAS, LARGE, SMALL, self.families, ANSWERS]
        if self.sizes != (SQUARE,):
            recipe.append(self.sizes)
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]

    def samples(self, split: str = "test", limit: int | None = None) -> list[ScenesSample]:
        """Samples of a split, families in turn: any ``limit`` is a balanced prefix of the whole."""
        dealt = in_turns(self.name, self.families, PER_FAMILY, split, limit)
        return [self.sample(split, family, index) for family, index in dealt]

    def sample(self, split: str, family: str, index: int) -> ScenesSample:
        """Sample ``index`` of a family: the same whatever else is drawn."""
        scene, question = draw(SEEDS[split], family, index, self.sizes)
        name = f"{self.name}-{split}-{family}-{index}"
        return ScenesSample(
            id=name,
            cluster=name,
            family=family,
            group=self.groups[family],
            question=question.text,
            answers=(question.answer,),
            history=(),
            images=(name,),
            scene=scene,
            ask=question,
        )

    def score(self, sample: Sample, answer: str) -> float:
        return exact(sample, answer)


def scenes() -> ScenesTask:
    """The benchmark of the model "natural"."""
    return ScenesTask()


def scenes_of_sizes() -> ScenesTask:
    """The same questions about pictures of three shapes, for models that read pictures of any size."""
    return ScenesTask("scenes-sizes", sizes=SIZES)


def draw(seed: int, family: str, index: int, sizes: tuple[Size, ...] = (SQUARE,)) -> tuple[Scene, Question]:
    """A scene and a question about it; the answers of a family take turns."""
    wanted = _answer(family, index)
    rng = np.random.default_rng([seed, FAMILIES.index(family), index])
    # not by the index, which says the answer: one of one size takes nothing from the generator
    size = sizes[int(rng.integers(len(sizes)))]
    for _ in range(_TRIES):
        scene = sample_scene(rng, size)
        # the scene is taken as it comes, and looked through for a question with the wanted answer
        fitting = [
            question
            for question in questions_about(scene, rng)
            if question.family == family and question.answer == wanted
        ]
        if fitting:
            return scene, fitting[int(rng.integers(len(fitting)))]
    raise SpecError(f"no scene for {family}/{wanted} in {_TRIES} tries; scenes leave too little room for it")


def _answer(family: str, index: int) -> str:
    if family == "small":  # colours and patterns take turns, or a guesser would gain by the rarer kind
        answers = ANSWERS["pattern" if index % 2 else "color"]
        return answers[index // 2 % len(answers)]
    return ANSWERS[family][index % len(ANSWERS[family])]
