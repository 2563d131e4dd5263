# SPDX-License-Identifier: Apache-2.0
"""Scenes: things on a canvas, drawn at random from a generator. Nothing here is rendered."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .vocabulary import COLORS, DIGITS, LETTERS, SHAPES, SIGN, SIGN_LENGTH, SIZES

CANVAS, PITCH = 144, 12  # pixels; characters of a sign stand PITCH apart
TEXTURES = ("flat", "gradient", "blobs", "stripes", "checker", "grain")
KINDS = ("common", "text", "needle", "count")


@dataclass(frozen=True)
class Thing:
    """A shape, or a sign with characters. ``x, y`` is the centre in pixels."""

    shape: str
    color: str
    size: str  # "" for a sign
    x: float
    y: float
    radius: float  # of a sign: half its height
    angle: float
    rgb: tuple[int, int, int]
    text: str = ""

    @property
    def half_width(self) -> float:
        return SIGN_LENGTH * PITCH / 2 + 2 if self.text else self.radius

    def place(self) -> tuple[str, str]:
        """Row and column word of the quadrant that the centre lies in."""
        return ("top" if self.y < CANVAS / 2 else "bottom", "left" if self.x < CANVAS / 2 else "right")


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows; background, clutter and noise are drawn from ``texture_seed``."""

    kind: str
    things: tuple[Thing, ...]
    frame: tuple[int, int, int, int]  # (left, top, right, bottom) inside the letterbox bars
    bars: tuple[int, int, int]
    texture: str
    marks: int
    noise: float
    texture_seed: int


def sample_scene(rng: np.random.Generator, kind: str) -> Scene:
    """A scene of one of ``KINDS``. The first thing of a needle scene is the needle."""
    frame, bars = _letterbox(rng)
    things: list[Thing] = []
    for wanted in _WANTED[kind](rng):
        placed = _place(rng, wanted, frame, things)
        if placed is not None:
            things.append(placed)
    # more clutter around a needle
    marks = int(rng.integers(30, 60)) if kind == "needle" else int(rng.integers(0, 14))
    texture, noise, texture_seed = (
        str(rng.choice(TEXTURES)),
        float(rng.uniform(0, 9)),
        int(rng.integers(2**31)),
    )
    return Scene(kind, tuple(things), frame, bars, texture, marks, noise, texture_seed)


def _letterbox(rng: np.random.Generator) -> tuple[tuple[int, int, int, int], tuple[int, int, int]]:
    # black, or the mean colour of CLIP's training images
    bars = (0, 0, 0) if rng.random() < 0.5 else (122, 116, 104)
    if rng.random() > 0.25:
        return (0, 0, CANVAS, CANVAS), bars
    width = int(rng.integers(8, 22))
    if rng.random() < 0.5:
        return (width, 0, CANVAS - width, CANVAS), bars
    return (0, width, CANVAS, CANVAS - width), bars


Wanted = tuple[str, str, str, str]  # shape, colour, size, text


def _palette(rng: np.random.Generator, shapes: int, colors: int) -> tuple[list[str], list[str]]:
    some = list(rng.choice(SHAPES, shapes, replace=False))
    return some, list(rng.choice(list(COLORS), colors, replace=False))


def _common(rng: np.random.Generator) -> list[Wanted]:
    shapes, colors = _palette(rng, int(rng.integers(3, 6)), int(rng.integers(3, 6)))
    sizes = rng.choice(list(SIZES), size=int(rng.integers(3, 7)), p=(0.35, 0.4, 0.25))
    return [
        (str(rng.choice(shapes)), str(rng.choice(colors)), str(size), "") for size in _largest_first(sizes)
    ]


def _count(rng: np.random.Generator) -> list[Wanted]:
    shapes, colors = _palette(rng, 3, 3)
    sizes = rng.choice(list(SIZES), size=int(rng.integers(3, 9)), p=(0.4, 0.5, 0.1))
    return [
        (str(rng.choice(shapes)), str(rng.choice(colors)), str(size), "") for size in _largest_first(sizes)
    ]


def _text(rng: np.random.Generator) -> list[Wanted]:
    colors = list(rng.permutation(list(COLORS)))
    signs = []
    for color in colors[: int(rng.integers(1, 4))]:
        alphabet = DIGITS if rng.random() < 0.5 else LETTERS
        signs.append((SIGN, str(color), "", "".join(rng.choice(list(alphabet), SIGN_LENGTH))))
    # up to two shapes, from the end of the list: the smallest
    return signs + _common(rng)[-1 : -1 - int(rng.integers(0, 3)) : -1]


def _needle(rng: np.random.Generator) -> list[Wanted]:
    shapes, colors = list(rng.permutation(SHAPES)), list(rng.permutation(list(COLORS)))
    # a crowd of equals, more than a small budget can hold: only the question tells which of them matters.
    # The needle has a shape or a colour of its own, not both, or it would be the odd one out
    unique = int(rng.random() < 0.5)
    pairs = [(shape, color) for shape in shapes[unique:] for color in colors[1 - unique :]]
    chosen = rng.permutation(len(pairs))[: int(rng.integers(24, 32))]
    sizes = _largest_first(rng.choice(("small", "medium"), size=len(chosen), p=(0.9, 0.1)))
    crowd = [
        (str(pairs[pair][0]), str(pairs[pair][1]), str(size), "")
        for pair, size in zip(chosen, sizes, strict=True)
    ]
    return [(str(shapes[0]), str(colors[0]), "small", ""), *crowd]


def _largest_first(sizes: np.ndarray) -> list[str]:
    # the large ones find room only while there is some
    return sorted(sizes, key=list(SIZES).index, reverse=True)


_WANTED = {"common": _common, "text": _text, "needle": _needle, "count": _count}


def _place(
    rng: np.random.Generator, wanted: Wanted, frame: tuple[int, int, int, int], others: list[Thing]
) -> Thing | None:
    """Put a thing where it overlaps no other, or nowhere after 30 tries."""
    shape, color, size, text = wanted
    radius = float(rng.uniform(*SIZES[size])) if size else float(rng.uniform(8.5, 10.5))
    red, green, blue = np.clip(np.array(COLORS[color]) + rng.integers(-12, 13, 3), 0, 255).tolist()
    # a sign is wider than high: half is for x, radius for y
    half = SIGN_LENGTH * PITCH / 2 + 2 if text else radius
    left, top, right, bottom = frame
    for _ in range(30):
        # small things and characters are held near patch centres: a budget can lose one with one patch
        near = 2.5 if size in ("small", "") else PITCH / 2
        x, y = (
            PITCH * (int(rng.integers(CANVAS // PITCH)) + 0.5) + float(rng.uniform(-near, near))
            for _ in range(2)
        )
        # all of it inside the frame
        if not (left + half < x < right - half and top + radius < y < bottom - radius):
            continue
        # apart along one axis is enough
        gap = 3
        if all(
            abs(x - o.x) > half + o.half_width + gap or abs(y - o.y) > radius + o.radius + gap for o in others
        ):
            angle = float(rng.uniform(-0.2, 0.2)) if size else 0.0
            return Thing(shape, color, size, x, y, radius, angle, (red, green, blue), text)
    return None
