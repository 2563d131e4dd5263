# SPDX-License-Identifier: Apache-2.0
"""Questions about a scene, each with an answer of one word and the things that it is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .scene import Scene, Thing
from .vocabulary import COLORS, PATTERNS, PLACES, YES_NO

# family -> its answers, equally frequent in the benchmark: 1 / len(answers) is what a guesser gets
ANSWERS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "pattern": PATTERNS,
    "exist": YES_NO,
    "place": PLACES,
    "small": tuple(COLORS) + PATTERNS,
}
FAMILIES = tuple(ANSWERS)


@dataclass(frozen=True)
class Question:
    """``asked``: numbers of the things in the scene; none where no such thing is there, or for the place."""

    family: str
    text: str
    answer: str
    asked: tuple[int, ...] = ()


def questions_about(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """All that can be asked about the scene; as many questions whether a thing is there have yes and no."""
    things, found = scene.things, [Question("place", "what is behind the object ?", scene.place)]
    for i in _unique(things, lambda thing: thing.pattern):
        family = "small" if things[i].small else "color"
        found.append(
            Question(family, f"what color is the {things[i].pattern} object ?", things[i].color, (i,))
        )
    for i in _unique(things, lambda thing: thing.color):
        family, name = "small" if things[i].small else "pattern", f"the {things[i].color} object ?"
        found.append(Question(family, f"what pattern has {name}", things[i].pattern, (i,)))
    return found + _exist(things, rng)


def _unique(things: Sequence[Thing], key: Callable[[Thing], str]) -> list[int]:
    """Numbers of things that no other thing shares the key with."""
    counts = Counter(key(thing) for thing in things)
    return [i for i, thing in enumerate(things) if counts[key(thing)] == 1]


def _exist(things: Sequence[Thing], rng: np.random.Generator) -> list[Question]:
    """Up to two large things that are there and as many that are not: in most of these, colour and pattern
    are there, but not together.
    """
    present = {(thing.color, thing.pattern) for thing in things}
    # whether a small thing is there is not asked
    large = sorted({(thing.color, thing.pattern) for thing in things if not thing.small})
    colors, patterns = {c for c, _ in present}, {p for _, p in present}
    # both words are true of something, but not of one thing
    crossed = [(c, p) for c in sorted(colors) for p in sorted(patterns) if (c, p) not in present]
    absent = [(c, p) for c in COLORS for p in PATTERNS if (c, p) not in present]
    found = []
    for pick in rng.permutation(len(large))[:2]:
        there = large[pick]
        asked = tuple(i for i, thing in enumerate(things) if (thing.color, thing.pattern) == there)
        found.append(Question("exist", "is there any {} {} object ?".format(*there), "yes", asked))
        pool = crossed if crossed and rng.random() < 0.7 else absent
        other = pool[int(rng.integers(len(pool)))]
        found.append(Question("exist", "is there any {} {} object ?".format(*other), "no"))
    return found
