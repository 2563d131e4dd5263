# SPDX-License-Identifier: Apache-2.0
"""The world of the benchmark: what things look like and every word that is said about them."""

from __future__ import annotations

SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
PLURALS = {shape: "crosses" if shape == "cross" else shape + "s" for shape in SHAPES}
COLORS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 75, 215),
    "yellow": (235, 215, 45),
    "purple": (140, 50, 175),
    "cyan": (50, 200, 215),
    "orange": (240, 130, 30),
    "white": (245, 245, 245),
}
SIZES = {"small": (5.2, 6.2), "medium": (9.5, 11.5), "large": (16.0, 19.0)}  # radius in pixels
DIGITS, LETTERS = "0123456789", "CEHKLNTUXY"
SIGN = "sign"
SIGN_LENGTH = 3
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
ORDER = ("first", "second")
COUNTS = ("1", "2", "3", "4")

# words of the questions that name no thing and no property
_GRAMMAR = [
    "is",
    "there",
    "a",
    "an",
    "what",
    "color",
    "shape",
    "size",
    "the",
    "object",
    "objects",
    "how",
    "many",
    "are",
    "of",
    "above",
    "below",
    "larger",
    "smaller",
    "than",
    "does",
    "say",
    "number",
    "on",
    "where",
    "it",
    "in",
    "image",
    "which",
    "has",
    "yes",
    "no",
    ",",
    "?",
]
# first in WORDS, whose places are the ids
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
ROLES = ("user:", "assistant:")
WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *SPECIAL,
            *ROLES,
            *SHAPES,
            *PLURALS.values(),
            SIGN,
            *COLORS,
            *SIZES,
            *DIGITS,
            *LETTERS.lower(),
            *ROWS,
            *COLUMNS,
            *ORDER,
            *_GRAMMAR,
        ]
    )
)
