# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 and LightOnOCR: a Pixtral tower, which reads pictures of any size in one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.method import Need
from ..hooks.adapter import ModalityName
from ..hooks.vision.capture import OF_PROJECTOR
from .base import Modality, check_pixels
from .merging import MergingAdapter, OfCells, per_picture, two_layers
from .refusals import check_beside
from .shrink import Resolution


def merged(connector: Any, rows: Tensor) -> Tensor:
    """Patches of tokens (..., merge**2 * C) through the rest of the projector, behind its norm."""
    return two_layers(connector, connector.patch_merger.merging_layer(rows))


class Mistral3Adapter(MergingAdapter):
    """Mistral3ForConditionalGeneration: the projector puts the patches of a cell together, then maps them."""

    model_type = "mistral3"
    towers = ("pixtral",)
    view = "stretch"
    parted: ClassVar[tuple[ModalityName, ...]] = ("image",)  # a mark behind each row

    def _projector(self) -> nn.Module:
        return OfCells(super()._projector(), merged)

    @property
    def read_by(self) -> nn.Module:
        return self.projector.connector.patch_merger.merging_layer

    @property
    def merge(self) -> int:
        return self.config.spatial_merge_size

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        super().check(arguments, modality)
        pixels, sizes = arguments.get(modality.pixels), arguments.get("image_sizes")
        if pixels is None:
            return
        check_pixels(modality.pixels, pixels, 4, "(images, channels, height, width)")
        count = pixels.shape[0]
        check_beside("image_sizes", sizes, (count, 2), f"(height, width) of each of the {count} images")

    def grid(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        height, width = torch.as_tensor(arguments["image_sizes"][number]).tolist()
        patch = self.config.vision_config.patch_size
        return height // patch, width // patch

    def resolution(self, processor: Any) -> Resolution:
        side = processor.patch_size * processor.spatial_merge_size

        def grid(picture: Any) -> tuple[int, int]:
            made = processor.image_processor(images=[picture], patch_size=side, return_tensors="pt")
            height, width = torch.as_tensor(made["image_sizes"][0]).tolist()
            return height // side, width // side

        # a picture that has whole tokens, and no more than it had, is not changed again
        return Resolution(side, grid, processor.image_processor.resample, lambda pixels: {})

    def divide(
        self,
        modality: Modality,
        need: Need,
        value: Tensor,
        counts: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        cell = self.merge if need.what in OF_PROJECTOR else 1
        grids = [self.grid(modality, number, arguments) for number in range(len(counts))]
        lengths = [(rows // cell) * (cols // cell) for rows, cols in grids]
        return per_picture(value.flatten(0, -2), lengths, counts)


class LightOnOcrAdapter(Mistral3Adapter):
    """LightOnOcrForConditionalGeneration."""

    model_type = "lighton_ocr"
    parted = ()
    tower, connector = "vision_encoder", "vision_projection"
