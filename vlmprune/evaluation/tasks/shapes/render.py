# SPDX-License-Identifier: Apache-2.0
"""From a scene to pixels and masks, with Pillow, at twice the size and then averaged."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scene import CANVAS, PITCH, Scene, Thing

ZOOM = 2  # things are drawn this much larger, so that edges are soft


def render(scene: Scene) -> Image.Image:
    """The (CANVAS, CANVAS) RGB picture of a scene."""
    # the order of draws is part of what a picture is: a change of it needs another VERSION
    rng = np.random.default_rng(scene.texture_seed)
    # from back to front: ground, clutter, things, bars, noise
    ground = Image.fromarray(_texture(rng, scene.texture)).resize(
        (CANVAS * ZOOM,) * 2, Image.Resampling.BILINEAR
    )
    draw = ImageDraw.Draw(ground)
    for _ in range(scene.marks):
        _mark(draw, rng)
    for thing in scene.things:
        draw_thing(draw, thing, thing.rgb)
        _write(draw, thing)
    # the part of the ground inside the frame, on bars of one colour
    left, top, right, bottom = (side * ZOOM for side in scene.frame)
    canvas = Image.new("RGB", ground.size, scene.bars)
    canvas.paste(ground.crop((left, top, right, bottom)), (left, top))
    pixels = np.asarray(canvas.reduce(ZOOM), dtype=np.float32)
    pixels = pixels + rng.normal(0, 1, pixels.shape).astype(np.float32) * scene.noise
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def mask(things: tuple[Thing, ...]) -> np.ndarray:
    """(CANVAS, CANVAS) bool: pixels that are at least half covered by any of the things."""
    return coverage(things) >= 0.5


def coverage(things: tuple[Thing, ...]) -> np.ndarray:
    """(CANVAS, CANVAS) float32 in [0, 1]: how much of each pixel the things cover."""
    canvas = Image.new("L", (CANVAS * ZOOM,) * 2)
    draw = ImageDraw.Draw(canvas)
    for thing in things:
        draw_thing(draw, thing, 255)
    return np.asarray(canvas.reduce(ZOOM), dtype=np.float32) / 255


def draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, fill: int | tuple[int, int, int]) -> None:
    """Draw the body of a thing, without the characters of a sign."""
    x, y, r = thing.x * ZOOM, thing.y * ZOOM, thing.radius * ZOOM
    if thing.text:
        w = thing.half_width * ZOOM
        draw.rounded_rectangle((x - w, y - r, x + w, y + r), radius=3 * ZOOM, fill=fill)
    elif thing.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif thing.shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(2 * ZOOM, round(0.36 * r)))
    else:
        cos, sin = math.cos(thing.angle), math.sin(thing.angle)
        draw.polygon(
            [(x + r * (a * cos - b * sin), y + r * (a * sin + b * cos)) for a, b in OUTLINES[thing.shape]],
            fill=fill,
        )


_T = 0.3  # half the thickness of a cross
# corners in radii, y downwards
OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (0.95, 0.85), (-0.95, 0.85)],
    "cross": [
        (-_T, -1),
        (_T, -1),
        (_T, -_T),
        (1, -_T),
        (1, _T),
        (_T, _T),
        (_T, 1),
        (-_T, 1),
        (-_T, _T),
        (-1, _T),
        (-1, -_T),
        (-_T, -_T),
    ],
    "bar": [(-0.38, -1.0), (0.38, -1.0), (0.38, 1.0), (-0.38, 1.0)],
}


def character_centres(thing: Thing) -> list[tuple[float, float]]:
    """Where the characters of a sign stand, in pixels."""
    # the middle of the characters is the centre of the sign
    first = thing.x - PITCH * (len(thing.text) - 1) / 2
    return [(first + PITCH * i, thing.y) for i in range(len(thing.text))]


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _write(draw: ImageDraw.ImageDraw, thing: Thing) -> None:
    # dark on light signs, light on dark ones
    light = 0.3 * thing.rgb[0] + 0.6 * thing.rgb[1] + 0.1 * thing.rgb[2]
    ink = (15, 15, 15) if light > 115 else (250, 250, 250)
    for character, (x, y) in zip(thing.text, character_centres(thing), strict=True):
        draw.text(
            (x * ZOOM, y * ZOOM),
            character,
            fill=ink,
            font=_font(round(1.55 * thing.radius * ZOOM)),
            anchor="mm",
        )


def _mark(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    """A short grey stroke, arc or dot."""
    x, y = rng.uniform(0, CANVAS * ZOOM, 2)
    angle, length = rng.uniform(0, math.pi), rng.uniform(3, 8) * ZOOM
    grey = int(rng.integers(30, 220))
    tint = tuple(int(c) for c in np.clip(grey + rng.integers(-15, 16, 3), 0, 255))
    kind = rng.integers(3)
    if kind == 0:
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        draw.line((x, y, *end), fill=tint, width=int(rng.integers(1, 2 * ZOOM)))
    elif kind == 1:
        start = math.degrees(angle)
        draw.arc((x, y, x + length, y + length), start, start + 150, fill=tint, width=ZOOM)
    else:
        r = rng.uniform(0.8, 2.2) * ZOOM
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tint)


def _texture(rng: np.random.Generator, kind: str) -> np.ndarray:
    """(CANVAS, CANVAS, 3) uint8 background of low saturation."""
    base = rng.uniform(60, 165) + rng.uniform(-14, 14, 3)
    contrast = rng.uniform(8, 26)
    x, y = np.meshgrid(np.linspace(-1, 1, CANVAS), np.linspace(-1, 1, CANVAS))
    # waves run along a random direction, in -1.4 .. 1.4
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == "gradient":
        wave = along * 1.4
    elif kind == "blobs":
        coarse = Image.fromarray(rng.normal(0, 1, (7, 7)).astype(np.float32))
        wave = np.asarray(coarse.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC))
    elif kind == "stripes":
        wave = np.sign(np.sin(along * rng.uniform(8, 30)))
    elif kind == "checker":
        period = rng.uniform(4, 12)
        wave = np.sign(np.sin(x * math.pi * period) * np.sin(y * math.pi * period))
    elif kind == "grain":
        wave = rng.normal(0, 0.8, (CANVAS, CANVAS))
    else:
        wave = np.zeros((CANVAS, CANVAS))  # "flat"
    return np.clip(base + contrast * wave[..., None], 0, 255).astype(np.uint8)
