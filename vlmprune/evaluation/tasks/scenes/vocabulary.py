# SPDX-License-Identifier: Apache-2.0
"""The world of the benchmark: what things look like, where they are, and every word that is said of them."""

from __future__ import annotations

from ..shapes.vocabulary import ROLES, SPECIAL

COLORS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (235, 215, 45),
    "purple": (140, 50, 175),
    "cyan": (50, 200, 215),
    "orange": (240, 130, 30),
    "pink": (245, 130, 190),
}
PATTERNS = ("plain", "striped", "barred", "checked", "dotted", "slanted")
PLACES = ("grass", "sand", "water", "brick", "wood", "snow")
SIDES = ("left", "right", "top", "bottom")
YES_NO = ("yes", "no")
_GRAMMAR = "what color pattern is has the there any object where behind it a at on in front of , . ?"
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [*SPECIAL, *ROLES, *COLORS, *PATTERNS, *PLACES, *SIDES, *YES_NO, *_GRAMMAR.split()],
    )
)
