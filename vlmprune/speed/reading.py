# SPDX-License-Identifier: Apache-2.0
"""What a processor does before a model is called: from the picture of a workload to its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import transformers
from torch import Tensor

from ..models import Adapter
from ..models.shrink import Shrink, shrink_for
from .shapes import SHAPES, prompt_of

# pictures and options of a processor to the inputs of a model
Make = Callable[[Sequence[Any], Mapping[str, Any]], dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Reading:
    """A processor with the pictures that it reads.

    Args:
        processor: as the adapter of the model asks it for sizes.
        images: PIL pictures, one for each prompt.
        make: calls it.
        shrink: what makes the pictures smaller before, if anything.
    """

    processor: Any
    images: Sequence[Any]
    make: Make
    shrink: Shrink | None = None

    def __call__(self) -> dict[str, Tensor]:
        """The inputs, made anew."""
        if self.shrink is None:
            return self.make(self.images, {})
        made = self.shrink(self.images)
        return self.make(made.images, made.options)

    def smaller(self, adapter: Adapter, spec: str) -> Reading:
        """The same of pictures that a spec of the picture slot shrinks."""
        return replace(self, shrink=shrink_for(adapter, self.processor, spec))


def reading_of_shape(name: str, model: Any, batch: int, text: int) -> Reading | None:
    """A picture of noise and the image processor of a shape; None where it is given pixels of its own."""
    shape = SHAPES[name]
    if shape.family != "qwen2_5_vl":
        return None
    # the one that needs Pillow only, where there are two
    kind = "Qwen2VLImageProcessor"
    images = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    processor = SimpleNamespace(image_processor=images())

    def make(pictures: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Tensor]:
        wanted = options.get("images_kwargs", {})
        made = processor.image_processor(images=list(pictures), return_tensors="pt", **wanted)
        return prompt_of(name, model, dict(made), len(pictures), text)

    return Reading(processor, [_noise(shape.image)] * batch, make)


def _noise(size: tuple[int, int]) -> Any:
    from PIL import Image

    values = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)
