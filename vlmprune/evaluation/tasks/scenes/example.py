# SPDX-License-Identifier: Apache-2.0
"""One question about one picture, for examples: the model "natural" can answer such."""

from __future__ import annotations

from ..shapes.example import Example
from . import scenes


def example(family: str = "color", number: int = 0) -> Example:
    """A test question of the benchmark "scenes"."""
    sample = scenes().sample("test", family, number)
    return Example(sample.load_images()[0], sample.question, sample.answers[0])
