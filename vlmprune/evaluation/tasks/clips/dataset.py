# SPDX-License-Identifier: Apache-2.0
"""The task: seven families, answers in equal shares, a clip for each (split, family, index)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ....errors import SpecError
from ..sample import Sample, exact, in_turns, normalise
from ..shapes.render import mask, render
from ..shapes.scene import CANVAS
from .story import FAMILIES, FRAMES, YES_NO, Kind, Story

VERSION = 1  # of everything that decides what a sample is
SEEDS = {"train": 404, "dev": 505, "test": 606}  # of the generators
PER_FAMILY = {"train": 2000, "dev": 100, "test": 400}
NOISE = 3.0  # of the camera, grey levels
_TRIES = 200


@dataclass(frozen=True)
class ClipSample(Sample):
    """A sample with its story; its images are the frames of one clip."""

    story: Story | None = field(repr=False, default=None)

    def load_images(self) -> list[Image.Image]:
        return [] if self.story is None else frames_of(self.story)

    def object_masks(self) -> list[np.ndarray]:
        if self.story is None:
            return []
        # (scene, numbers of the things asked about), frame by frame
        pairs = zip(self.story.frames, self.story.asked, strict=True)
        return [mask(tuple(scene.things[i] for i in asked)) for scene, asked in pairs]

    def messages(self) -> list[dict[str, Any]]:
        """All frames, then the question; no word says which frame is which."""
        content = [{"type": "image"} for _ in self.images]
        return [{"role": "user", "content": [*content, {"type": "text", "text": self.question}]}]


def frames_of(story: Story) -> list[Image.Image]:
    """(CANVAS, CANVAS) RGB pictures; what stands still differs by noise only."""
    rng = np.random.default_rng(story.seed)
    # a scene that is seen in several frames is drawn once
    drawn = {scene: np.asarray(render(scene), dtype=np.float32) for scene in set(story.frames)}
    found = []
    for scene in story.frames:
        # noise of its own for every frame, or still places would be equal to the bit
        pixels = drawn[scene] + rng.normal(0, NOISE, drawn[scene].shape).astype(np.float32)
        found.append(Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)))
    return found


@dataclass(frozen=True)
class ClipsTask:
    """Synthetic questions about clips of eight frames, drawn on the fly. Build one with ``clips()``.

    Attributes:
        frames: the images of a sample are the frames of one clip, as ``prune(..., frames=True)`` is told.
    """

    name: str = "clips"
    families: tuple[str, ...] = tuple(family.name for family in FAMILIES)

    frames: ClassVar[bool] = True

    @property
    def groups(self) -> Mapping[str, str]:
        return dict.fromkeys(self.families, "general")

    @property
    def blind(self) -> Mapping[str, float]:
        """Score of the best constant answer."""
        return {family.name: 1 / len(family.answers) for family in FAMILIES if family.name in self.families}

    @cached_property
    def fingerprint(self) -> str:
        answers = [(family.name, family.answers) for family in FAMILIES]
        # VERSION stands for all that decides a sample and is not listed
        recipe = json.dumps([self.name, VERSION, SEEDS, PER_FAMILY, CANVAS, FRAMES, NOISE, answers])
        return hashlib.sha256(recipe.encode()).hexdigest()[:16]

    def samples(self, split: str = "test", limit: int | None = None) -> list[ClipSample]:
        """Samples of a split, families in turn: any ``limit`` is a balanced prefix of the whole."""
        dealt = in_turns(self.name, self.families, PER_FAMILY, split, limit)
        return [self.sample(split, family, index) for family, index in dealt]

    def sample(self, split: str, family: str, index: int) -> ClipSample:
        """Sample ``index`` of a family: the same whatever else is drawn, on any shard."""
        story, cluster = draw(SEEDS[split], family, index)
        stem = f"{self.name}-{split}-{family}"
        return ClipSample(
            id=f"{stem}-{index}",
            cluster=f"{stem}-{cluster}",
            family=family,
            group="general",
            question=story.question,
            answers=(normalise(story.answer),),
            history=(),
            images=tuple(f"{stem}-{cluster}-{t}" for t in range(len(story.frames))),
            story=story,
        )

    def score(self, sample: Sample, answer: str) -> float:
        return exact(sample, answer)


def clips() -> ClipsTask:
    """The benchmark of clips that ships with the package."""
    return ClipsTask()


def draw(seed: int, family: str, index: int) -> tuple[Story, int]:
    """A story and the number of its clip. Answers take turns; yes and no are asked about the same clip, so
    that what a clip makes likely helps nobody.
    """
    kind: Kind = next(one for one in FAMILIES if one.name == family)
    paired = kind.answers == YES_NO
    cluster = index - index % 2 if paired else index
    # yes and no: the clip has to fit both
    answers = kind.answers if paired else (kind.answers[index % len(kind.answers)],)
    number = FAMILIES.index(kind)
    for attempt in range(_TRIES):
        # one generator for both answers: they must draw the same clip
        made = [kind.tell(np.random.default_rng([seed, number, cluster, attempt]), one) for one in answers]
        stories = [one for one in made if one is not None]
        if len(stories) == len(answers):
            return stories[index % len(answers)], cluster
    raise SpecError(f"no clip for {family} in {_TRIES} tries; clips leave too little room for it")
