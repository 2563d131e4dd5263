# SPDX-License-Identifier: Apache-2.0
"""Samples with pictures so wide that families cut them into tiles, and a task that every answer meets."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlmprune.evaluation.tasks.sample import Sample


def noise(seed: int, height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class Wide(Sample):
    """Each name of an image is its width; the mask is the upper half."""

    def load_images(self) -> list[Image.Image]:
        return [noise(int(name), 150, int(name)) for name in self.images]

    def object_masks(self) -> list[np.ndarray]:
        masks = [np.zeros(image.size[::-1], dtype=bool) for image in self.load_images()]
        for mask in masks:
            mask[: len(mask) // 2] = True
        return masks


class Easy:
    """A task to which every answer is right."""

    def score(self, sample: Sample, answer: str) -> float:
        return 1.0


def wide(number: int, *widths: str) -> Wide:
    told = {"family": "noise", "group": "general", "question": "what?", "answers": ("x",), "history": ()}
    return Wide(id=f"s{number}", cluster=f"c{number}", images=widths, **told)
