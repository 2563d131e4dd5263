# SPDX-License-Identifier: Apache-2.0
"""One question about one clip, for examples: the model "video" can answer such."""

from __future__ import annotations

from ....videofile import Clip
from . import clips


def example(family: str = "change", number: int = 0) -> tuple[Clip, str, str]:
    """A test question of the benchmark "clips", whose frames stand for one second each, and its answer."""
    sample = clips().sample("test", family, number)
    frames = sample.load_images()
    times = [t + 0.5 for t in range(len(frames))]
    clip = Clip("a drawn clip", frames, times, float(len(frames)), len(frames))
    return clip, sample.question, sample.answers[0]
