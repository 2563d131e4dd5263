# SPDX-License-Identifier: Apache-2.0
"""Scenes: patterned things before a place, drawn at random from a generator. Nothing here is painted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .vocabulary import COLORS, PATTERNS, PLACES, SIDES

CANVAS = 96  # pixels
Size = tuple[int, int]  # height and width of a picture in pixels
SQUARE: Size = (CANVAS, CANVAS)
LARGE, SMALL = (10.0, 21.0), (5.0, 6.5)  # radius in pixels
_TRIES = 40
_CLEAR = 5.0  # pixels by which one side must be nearer than any side of the other axis


@dataclass(frozen=True)
class Thing:
    """A patterned disc or rounded square. ``x, y`` is its centre in pixels."""

    color: str
    pattern: str
    x: float
    y: float
    radius: float
    square: bool
    phase: tuple[float, float]
    rgb: tuple[int, int, int]

    @property
    def small(self) -> bool:
        return self.radius <= SMALL[1]

    def side(self, size: Size = SQUARE) -> str | None:
        """The side of the picture that it stands at; None where two are about as near."""
        across, down = self.x - size[1] / 2, self.y - size[0] / 2
        if abs(abs(across) - abs(down)) < _CLEAR:
            return None
        if abs(across) > abs(down):
            return SIDES[int(across > 0)]
        return SIDES[2 + int(down > 0)]


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows; grain and light of the place are drawn from ``seed``."""

    place: str
    things: tuple[Thing, ...]
    seed: int
    size: Size = SQUARE


def sample_scene(rng: np.random.Generator, size: Size = SQUARE) -> Scene:
    """One to three large things and up to two small ones, of four colours and four patterns."""
    # few colours and patterns, so that things share them
    colors, patterns = rng.permutation(list(COLORS))[:4], rng.permutation(PATTERNS)[:4]
    # even by the logarithm, or most would be large
    least, most = (math.log(radius) for radius in LARGE)
    large = np.exp(rng.uniform(least, most, int(rng.integers(1, 4))))
    # large ones first: they find room only while there is some
    radii = [*sorted(large, reverse=True), *rng.uniform(*SMALL, size=int(rng.integers(0, 3)))]
    things: list[Thing] = []
    for radius in radii:
        spot = _free_spot(rng, float(radius), things, size)
        if spot is not None:
            color, pattern = str(rng.choice(colors)), str(rng.choice(patterns))
            rgb = np.clip(np.array(COLORS[color]) + rng.integers(-14, 15, 3), 0, 255).tolist()
            phase = (float(rng.uniform(0, 6)), float(rng.uniform(0, 6)))
            square = bool(rng.random() < 0.5)
            things.append(
                Thing(color, pattern, *spot, float(radius), square, phase, (rgb[0], rgb[1], rgb[2]))
            )
    return Scene(str(rng.choice(PLACES)), tuple(things), int(rng.integers(2**31)), size)


def _free_spot(
    rng: np.random.Generator, radius: float, others: list[Thing], size: Size
) -> tuple[float, float] | None:
    """A centre where a thing overlaps no other, or None after some tries."""
    for _ in range(_TRIES):
        x, y = (float(rng.uniform(radius + 1, edge - radius - 1)) for edge in reversed(size))
        if all(math.hypot(x - o.x, y - o.y) > 1.2 * (radius + o.radius) + 2 for o in others):
            return x, y
    return None
