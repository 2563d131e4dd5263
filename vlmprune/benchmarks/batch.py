# SPDX-License-Identifier: Apache-2.0
"""Batches of samples as model inputs, and the shelf of images that are encoded once for all specs."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.shelf import Shelf, Shelved
from ..errors import EvaluationError
from ..models.loading import prompt

Key = tuple[bytes, ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that are answered together.

    Args:
        texts, images: of every sample; no images for a text-only one.
        inputs: left-padded model inputs on the device of the model.
        pictures: numbers of the images of every sample, counted over the batch.
    """

    samples: Sequence[Any]
    texts: list[str]
    images: list[list[Any]]
    inputs: dict[str, Any]
    pictures: list[range]

    @classmethod
    def make(cls, samples: Sequence[Any], processor: Any, model: Any) -> Batch:
        images, texts, pictures, start = [], [], [], 0
        for sample in samples:
            try:
                images.append(list(sample.load_images()))
            except Exception as error:
                raise EvaluationError(f"{sample.id}: its images cannot be loaded: {type(error).__name__}: {error}") from error
            texts.append(prompt(processor, sample.question, len(images[-1]), sample.history))
            pictures.append(range(start, start := start + len(images[-1])))
        return cls(samples, texts, images, _inputs(processor, model, texts, images), pictures)

    @property
    def named(self) -> str:
        """For messages."""
        first, last = self.samples[0].id, self.samples[-1].id
        return f"sample {first!r}" if len(self.samples) == 1 else f"the {len(self.samples)} samples {first!r} to {last!r}"

    def keys(self) -> list[Key]:
        """What tells the images of every sample apart: a model may encode several images together, so they count as a whole."""
        return [tuple(_digest(image) for image in images) for images in self.images]


class EncodeOnce:
    """Remembers encoded images, the most recent ``size`` of them."""

    def __init__(self, shelf: Shelf, processor: Any, size: int) -> None:
        self.shelf, self.processor, self.size = shelf, processor, size
        self._known: OrderedDict[Key, list[Shelved]] = OrderedDict()

    def take(self, batch: Batch) -> list[Shelved]:
        """The images of a batch in order; those not seen before are encoded in one call."""
        keys = batch.keys()
        new = {key: row for row, key in enumerate(keys) if key and key not in self._known}
        if new:
            rows = list(new.values())
            images = [batch.images[row] for row in rows]
            model = self.shelf.adapter.model
            found = iter(self.shelf.encode(_inputs(self.processor, model, [batch.texts[row] for row in rows], images)))
            self._known |= {key: [next(found) for _ in key] for key in new}
        shelved = []
        for key in filter(None, keys):
            self._known.move_to_end(key)
            shelved += self._known[key]
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return shelved


def _inputs(processor: Any, model: Any, texts: list[str], images: list[list[Any]]) -> dict[str, Any]:
    shown = [row for row in images if row] or None  # families that pack by sample want no entry for rows without images
    made = processor(text=texts, images=shown, padding=True, padding_side="left", return_tensors="pt")
    return dict(made.to(model.device, model.dtype))


def _digest(image: Any) -> bytes:
    return hashlib.blake2b(repr((image.mode, image.size)).encode() + image.tobytes(), digest_size=16).digest()
