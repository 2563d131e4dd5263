# SPDX-License-Identifier: Apache-2.0
"""From a scene to pixels and coverage, in plain numpy: no font, no drawing library."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from .scene import SQUARE, Scene, Size, Thing

PERIOD = 6.0  # pixels of a pattern: shorter than a patch, so that every patch of a thing shows it
Waves = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _sign(wave: np.ndarray) -> np.ndarray:
    # steep flanks, but no hard edges
    return np.clip(1.8 * wave, -1, 1)


def _turn(along: np.ndarray) -> np.ndarray:
    return np.sin(2 * np.pi / PERIOD * along)


_PATTERN: dict[str, Waves] = {  # (x, y) -> brightness in [-1, 1]
    "plain": lambda x, y: np.zeros_like(x),
    "striped": lambda x, y: _sign(_turn(y)),
    "barred": lambda x, y: _sign(_turn(x)),
    "checked": lambda x, y: _sign(2 * _turn(x) * _turn(y)),
    "dotted": lambda x, y: 2 * ((x % PERIOD - 3) ** 2 + (y % PERIOD - 3) ** 2 < 3.2).astype(np.float32) - 1,
    "slanted": lambda x, y: _sign(_turn((x + y) * 0.7071)),
}
# base colour, contrast, and the wave of a place
_PLACE: dict[str, tuple[tuple[int, int, int], float, Waves]] = {
    "grass": ((88, 112, 74), 13, lambda x, y: np.sin(x * 1.9 + 2 * np.sin(y * 0.7))),
    "sand": ((176, 160, 128), 7, lambda x, y: np.sin(0.3 * x + 0.5 * y + 2 * np.sin(0.08 * x))),
    "water": ((92, 112, 132), 11, lambda x, y: np.sin(0.55 * y + 1.5 * np.sin(0.12 * x))),
    "brick": ((128, 92, 82), 15, lambda x, y: 1 - 2 * ((y % 12 < 2) | ((x + 9 * (y // 12)) % 18 < 2))),
    "wood": ((120, 98, 76), 10, lambda x, y: np.sin(0.5 * x + 1.2 * np.sin(0.06 * y))),
    "snow": ((205, 208, 212), 4, lambda x, y: np.sin(0.11 * x) * np.sin(0.09 * y)),
}


def paint(scene: Scene) -> np.ndarray:
    """The (height, width, 3) uint8 picture of a scene."""
    y, x = _centres(scene.size)  # (height, width) each
    # the order of draws is part of what a picture is: a change of it needs another VERSION
    rng = np.random.default_rng(scene.seed)
    # ground: colour and wave of the place, and light from one side
    base, contrast, wave = _PLACE[scene.place]
    shift, angle, slope = rng.uniform(0, 50, 2), rng.uniform(0, 2 * np.pi), rng.uniform(0, 22)
    height, width = scene.size
    light = slope * ((x / width - 0.5) * np.cos(angle) + (y / height - 0.5) * np.sin(angle))
    tint = np.asarray(base, np.float32) + rng.uniform(-9, 9, 3).astype(np.float32)
    brightness = contrast * wave(x + shift[0], y + shift[1]) + light  # (height, width)
    pixels = tint + brightness[..., None].astype(np.float32)
    # things in order, each with its pattern on its own colour
    for thing in scene.things:
        pattern = _PATTERN[thing.pattern](x + thing.phase[0], y + thing.phase[1])
        skin = np.asarray(thing.rgb, np.float32) * (0.8 + 0.3 * pattern[..., None])
        share = coverage(thing, scene.size)[..., None]
        pixels = (1 - share) * pixels + share * skin
    # grain over all
    noise = rng.normal(0, 1, pixels.shape).astype(np.float32) * rng.uniform(0, 8)
    return np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)


def coverage(thing: Thing, size: Size = SQUARE) -> np.ndarray:
    """(height, width) float32 in [0, 1]: how much of each pixel the thing covers, edges softened."""
    y, x = _centres(size)
    across, down = np.abs(x - thing.x), np.abs(y - thing.y)
    # a square of the same name has sides of 1.7 radii, so that areas are alike
    away = np.maximum(across, down) / 0.87 if thing.square else np.hypot(across, down)
    return np.clip(0.5 + thing.radius - away, 0, 1)


@cache
def _centres(size: Size) -> np.ndarray:
    """(2, height, width) float32: down and across, of the middle of every pixel."""
    return np.mgrid[0 : size[0], 0 : size[1]].astype(np.float32) + 0.5
