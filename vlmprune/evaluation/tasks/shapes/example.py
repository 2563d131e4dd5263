# SPDX-License-Identifier: Apache-2.0
"""One question about one picture, for examples: the tiny model can answer it."""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

from ....checks import one_of
from ....errors import SpecError
from . import shapes

_SEVERAL = ("two_turn", "multi_image")  # families whose questions have an earlier turn or a second picture


class Example(NamedTuple):
    """A picture, what is asked about it, and the right answer."""

    picture: Image.Image
    question: str
    answer: str


def example(family: str = "text", number: int = 0) -> Example:
    """A test question of the synthetic benchmark about one picture; the model "tiny" was trained on such
    questions.

    Args:
        family: kind of question, such as "text" (a sign to read), "attribute" or "count".
        number: which question of the family.

    Examples:
        >>> vlmprune.example().question
        'what does the purple sign say ?'
    """
    task = shapes()
    one_of("family", family, tuple(name for name in task.families if name not in _SEVERAL))
    if type(number) is not int or number < 0:
        raise SpecError(f"number={number!r}; expected 0, 1, ...: which question of the family {family!r}")
    sample = task.sample("test", family, number)
    return Example(sample.load_images()[0], sample.question, sample.answers[0])
