# SPDX-License-Identifier: Apache-2.0
"""Batches of samples as model inputs, and the images that are encoded once for all specs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from ...errors import EvaluationError
from ...hooks.vision.encode import EncodedImage, EncodedImages
from ...models import adapter_for
from ...models.base import Adapter
from ...models.shrink import Shrink, Shrunk
from ..stats.objects import Asked
from ..tasks.sample import Sample


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples that are answered together.

    Args:
        texts, images, asked: of every sample: its prompt, its pictures, and what it asks about.
        inputs: left-padded model inputs on the device of the model.
        pictures: numbers of the pictures that the model makes of the images of every sample, counted over the
            batch: more than there are images where tiles are pictures to it.
        options: of the processor, for the images.
        smaller: how the images were shrunk, where they were.
    """

    samples: Sequence[Sample]
    texts: list[str]
    images: list[list[Any]]
    asked: list[Asked]
    inputs: dict[str, Any]
    pictures: list[range]
    options: Mapping[str, Any] = field(default_factory=dict)
    smaller: Shrunk | None = None

    @classmethod
    def make(cls, samples: Sequence[Sample], processor: Any, model: Any, frames: bool = False) -> Batch:
        """Questions as a model reads them.

        Args:
            frames: whether the images of a sample are the frames of a clip, which are not cut into tiles.
        """
        texts, images, asked = [], [], []
        for sample in samples:
            try:
                images.append(list(sample.load_images()))
            except Exception as error:
                raise EvaluationError(
                    f"{sample.id}: its images cannot be loaded: {type(error).__name__}: {error}"
                ) from error
            if len(images[-1]) != len(sample.images):
                given = f"names {len(sample.images)} images and loads {len(images[-1])}"
                raise EvaluationError(f"{sample.id} {given}; expected one for each name")
            asked.append(Asked(sample.id, sample.object_masks(), len(sample.images)))
            texts.append(processor.apply_chat_template(sample.messages(), add_generation_prompt=True))
        adapter = adapter_for(model)
        options = adapter.of_frames if frames else {}
        inputs = model_inputs(processor, model, texts, images, options=options)
        pictures = ranges(list(map(len, images))) if frames else numbered(adapter, processor, images)
        return cls(samples, texts, images, asked, inputs, pictures, options)

    def shrunk(self, shrink: Shrink, processor: Any, model: Any) -> Batch:
        """The same questions about smaller images."""
        several = [len(row) > 1 for row in self.images for _ in row]
        made = shrink([image for row in self.images for image in row], several)
        # back to a list for each sample
        small, parts = iter(made.images), iter(made.parts)
        images = [[next(small) for _ in row] for row in self.images]
        pictures = ranges([sum(next(parts) for _ in row) for row in self.images])
        options = {**self.options, **made.options}
        inputs = model_inputs(processor, model, self.texts, images, options=options)
        return replace(self, images=images, inputs=inputs, pictures=pictures, smaller=made)

    def check(self, tokens: Sequence[int], spec: str) -> None:
        """Raise where the model read other numbers of tokens than smaller images were made for."""
        if self.smaller is None:
            return
        read = [sum(tokens[number] for number in shown) for shown in ranges(self.smaller.parts)]
        if tuple(read) != self.smaller.tokens:
            raise EvaluationError(
                f"{spec}: the model read {read} visual tokens on {self.named}; expected "
                f"{list(self.smaller.tokens)}: its processor changed the size of the pictures again"
            )

    def whole(self, row: int) -> dict[str, int]:
        """Fields of a Record: the tokens that the images of a row would have at their own size, where they
        were shrunk.
        """
        if self.smaller is None:
            return {}
        shown = ranges([len(images) for images in self.images])[row]
        return {"dense_tokens": sum(self.smaller.dense[number] for number in shown)}

    @property
    def named(self) -> str:
        """For messages."""
        first, last = self.samples[0].id, self.samples[-1].id
        return (
            f"sample {first!r}"
            if len(self.samples) == 1
            else f"the {len(self.samples)} samples {first!r} to {last!r}"
        )


class EncodeOnce:
    """Encoded images of the last ``size`` samples; a model may encode the images of one together."""

    def __init__(self, encoded: EncodedImages, processor: Any, size: int) -> None:
        self.encoded, self.processor = encoded, processor
        self.size = size
        # names of the images of a sample -> what was encoded; the least recently used first
        self._known: OrderedDict[tuple[str, ...], list[EncodedImage]] = OrderedDict()

    def take(self, batch: Batch) -> list[EncodedImage]:
        """The images of a batch in order; those not seen before are encoded in one call."""
        keys = [sample.images for sample in batch.samples]
        # equal keys are equal images: one row stands for all that show them
        new = {key: row for row, key in enumerate(keys) if key and key not in self._known}
        if new:
            texts = [batch.texts[row] for row in new.values()]
            images = [batch.images[row] for row in new.values()]
            model = self.encoded.adapter.model
            inputs = model_inputs(self.processor, model, texts, images, options=batch.options)
            found = iter(self.encoded.encode(inputs))
            # they come in the order in which they were given
            self._known |= {key: [next(found) for _ in batch.pictures[row]] for key, row in new.items()}
        taken = []
        for key in filter(None, keys):
            self._known.move_to_end(key)  # used just now, so dropped last
            taken += self._known[key]
        # after the batch was served, which may hold more than that
        while len(self._known) > self.size:
            self._known.popitem(last=False)
        return taken


def ranges(counts: Sequence[int]) -> list[range]:
    """Numbers that are counted on from row to row: 0 and 1 for a row of two, 2 for the next of one."""
    ends = list(accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


def numbered(adapter: Adapter, processor: Any, images: Sequence[Sequence[Any]]) -> list[range]:
    """Numbers of the pictures that a model makes of the images of every row, counted over all rows."""
    return ranges([sum(adapter.parts(processor, image) for image in row) for row in images])


def model_inputs(
    processor: Any,
    model: Any,
    texts: list[str],
    images: list[list[Any]],
    clips: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What ``model.generate`` takes: left-padded, on its device, in its dtype.

    Args:
        clips: of all texts.
        options: of the processor, for the images.
    """
    # families that pack by sample want no entry for rows without images
    shown: list[Any] = [row for row in images if row]
    if not adapter_for(model).nests:
        shown = [image for row in shown for image in row]
    videos = {"videos": list(clips)} if clips else {}
    made = processor(
        text=texts,
        images=shown or None,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **videos,
        **(options or {}),
    )
    return dict(made.to(model.device, model.dtype))
