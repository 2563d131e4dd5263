# SPDX-License-Identifier: Apache-2.0
"""A picture for examples: a scene drawn with Pillow alone."""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw, ImageFont

_SKIES = (
    ((74, 144, 222), (222, 240, 252)),
    ((104, 126, 204), (252, 222, 204)),
    ((62, 160, 198), (232, 247, 244)),
)
_HOUSES = (
    ((246, 228, 192), (176, 58, 48)),
    ((228, 216, 234), (64, 84, 140)),
    ((216, 234, 222), (142, 86, 42)),
)  # walls, roof
_BRIGHT = ((226, 66, 84), (250, 176, 40), (58, 146, 212), (150, 88, 190), (240, 120, 60))
_WORDS = ("CAFE", "OPEN", "HELLO", "No 42")
_FINE = 3  # drawn this many times larger, then reduced: Pillow draws hard edges
_SIDE = 336 * _FINE

_Colour = tuple[int, int, int]


def picture(seed: int = 0, size: tuple[int, int] = (336, 336)) -> Image.Image:
    """Draw a house with a sign, a tree, the sun, a kite and three balls; the same seed gives the same
    picture.

    Args:
        seed: varies colours, places and the word on the sign.
        size: (width, height) in pixels, as Pillow has it; the scene is stretched to it.
    """
    pick = random.Random(seed)
    sky = _SKIES[seed % len(_SKIES)]
    image = Image.new("RGB", (_SIDE, _SIDE))
    draw = _Scene(image)
    draw.gradient(0, 226, *sky)
    draw.sun(pick.randint(44, 80), pick.randint(42, 64))
    draw.cloud(pick.randint(136, 180), pick.randint(36, 60), 1.0)
    draw.cloud(pick.randint(270, 300), pick.randint(84, 104), 0.7)
    draw.hills(sky[1])
    draw.gradient(226, 336, (126, 190, 92), (70, 140, 66))
    draw.kite(pick.randint(212, 250), pick.randint(34, 60), pick.choice(_BRIGHT))
    draw.house(70 + pick.randint(-8, 8), *_HOUSES[seed % len(_HOUSES)], pick.choice(_WORDS))
    draw.tree(270 + pick.randint(-10, 10))
    for x, colour in zip((64, 196, 258), pick.sample(_BRIGHT, 3), strict=True):
        draw.ball(x + pick.randint(-14, 14), 300 + pick.randint(-6, 8), pick.randint(10, 16), colour)
    return image.resize(size, Image.Resampling.LANCZOS)


class _Scene:
    """Draws in units of 1/336 of the canvas."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def polygon(self, points: list[tuple[float, float]], fill: _Colour) -> None:
        self._draw.polygon([(x * _FINE, y * _FINE) for x, y in points], fill)

    def box(self, x: float, y: float, width: float, height: float, fill: _Colour) -> None:
        self._draw.rectangle([x * _FINE, y * _FINE, (x + width) * _FINE, (y + height) * _FINE], fill)

    def disc(self, x: float, y: float, rx: float, fill: _Colour, ry: float | None = None) -> None:
        ry = rx if ry is None else ry
        self._draw.ellipse([(x - rx) * _FINE, (y - ry) * _FINE, (x + rx) * _FINE, (y + ry) * _FINE], fill)

    def line(self, points: list[tuple[float, float]], fill: _Colour, width: float) -> None:
        self._draw.line(
            [(x * _FINE, y * _FINE) for x, y in points], fill, round(width * _FINE), joint="curve"
        )

    def gradient(self, top: int, bottom: int, first: _Colour, last: _Colour) -> None:
        for y in range(top * _FINE, bottom * _FINE):
            self._draw.line([(0, y), (_SIDE, y)], _mix(first, last, (y / _FINE - top) / (bottom - top)))

    def sun(self, x: float, y: float) -> None:
        for i in range(12):
            a = math.tau * i / 12
            self.line([(x + r * math.cos(a), y + r * math.sin(a)) for r in (30, 38)], (255, 206, 84), 3)
        self.disc(x, y, 24, (255, 196, 58))
        self.disc(x, y, 20, (255, 214, 92))

    def cloud(self, x: float, y: float, scale: float) -> None:
        for dx, dy, r in ((-20, 4, 11), (-6, -4, 15), (12, -1, 13), (25, 5, 9)):
            self.disc(x + dx * scale, y + dy * scale, r * scale, (255, 255, 255))
        self.box(x - 20 * scale, y + 4 * scale, 45 * scale, 10 * scale, (255, 255, 255))

    def hills(self, haze: _Colour) -> None:
        self.disc(70, 262, 150, _mix((110, 170, 120), haze, 0.45), 76)
        self.disc(280, 268, 170, _mix((96, 160, 104), haze, 0.25), 84)

    def kite(self, x: float, y: float, colour: _Colour) -> None:
        self.line([(x + 6 * math.sin(t / 9), y + 24 + t) for t in range(70)], (90, 90, 100), 1)
        for t in (18, 36, 54):
            bow, height = x + 6 * math.sin(t / 9), y + 24 + t
            self.polygon(
                [(bow - 6, height - 4), (bow - 6, height + 4), (bow + 6, height - 4), (bow + 6, height + 4)],
                colour,
            )
        self.polygon([(x, y - 24), (x + 17, y), (x, y + 26), (x - 17, y)], colour)
        self.polygon([(x, y - 24), (x + 17, y), (x, y)], _mix(colour, (255, 255, 255), 0.45))
        self.polygon([(x, y + 26), (x - 17, y), (x, y)], _mix(colour, (255, 255, 255), 0.25))

    def house(self, x: float, wall: _Colour, roof: _Colour, word: str) -> None:
        y = 172  # top of the wall
        self.box(x + 92, y - 46, 14, 34, _mix(roof, (40, 40, 40), 0.35))
        self.box(x, y, 124, 88, wall)
        self.polygon([(x - 12, y), (x + 62, y - 58), (x + 136, y)], roof)
        self.disc(x + 62, y - 22, 10, wall)
        self.disc(x + 62, y - 22, 7, (120, 176, 214))
        self.box(x + 48, y + 36, 28, 52, _mix(roof, (60, 36, 24), 0.5))
        self.disc(x + 70, y + 63, 2.2, (250, 214, 110))
        for left in (x + 10, x + 86):
            self.box(left, y + 40, 28, 26, (255, 255, 255))
            self.box(left + 2, y + 42, 24, 22, (126, 184, 220))
            self.line([(left + 14, y + 42), (left + 14, y + 64)], (255, 255, 255), 2)
            self.line([(left + 2, y + 53), (left + 26, y + 53)], (255, 255, 255), 2)
        self.box(x + 30, y + 8, 64, 21, (52, 56, 72))
        font = ImageFont.load_default(size=16 * _FINE)
        self._draw.text(((x + 62) * _FINE, (y + 18.5) * _FINE), word, (255, 244, 214), font=font, anchor="mm")

    def tree(self, x: float) -> None:
        self.polygon([(x - 6, 196), (x + 6, 196), (x + 10, 266), (x - 10, 266)], (118, 78, 50))
        for dx, dy, r, shade in (
            (-22, 8, 25, 0.0),
            (23, 6, 26, 0.1),
            (0, -22, 31, 0.2),
            (-3, 6, 25, 0.3),
            (9, -28, 14, 0.5),
        ):
            self.disc(x + dx, 176 + dy, r, _mix((38, 112, 60), (118, 186, 88), shade))
        for dx, dy in ((-24, 4), (18, -14), (4, 14), (-6, -32), (28, 12)):
            self.disc(x + dx, 178 + dy, 4, (222, 60, 60))

    def ball(self, x: float, y: float, radius: float, colour: _Colour) -> None:
        self.disc(x, y + radius, radius * 1.05, (62, 120, 58), radius * 0.3)
        self.disc(x, y, radius, colour)
        self.disc(x - radius * 0.3, y - radius * 0.35, radius * 0.35, _mix(colour, (255, 255, 255), 0.6))


def _mix(first: _Colour, last: _Colour, share: float) -> _Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, last, strict=True))
    return red, green, blue
