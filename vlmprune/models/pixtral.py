# SPDX-License-Identifier: Apache-2.0
"""Mistral 3 and LightOnOCR: a Pixtral tower, which reads pictures of any size in one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Need
from ..errors import CaptureError
from ..hooks.vision.capture import OF_PROJECTOR
from .base import Adapter, Modality, Part, check_pixels


class AfterMerging(nn.Module):
    """What the projector does with the merged patches of a token: rows (..., merge**2 * C) to (..., D)."""

    def __init__(self, connector: nn.Module) -> None:
        super().__init__()
        self.connector: Part = connector

    def forward(self, rows: Tensor) -> Tensor:
        connector = self.connector
        hidden = connector.act(connector.linear_1(connector.patch_merger.merging_layer(rows)))
        return connector.linear_2(hidden)


class Mistral3Adapter(Adapter):
    """Mistral3ForConditionalGeneration: the projector puts the patches of a cell together, then maps them."""

    model_type = "mistral3"
    towers = ("pixtral",)
    view = "stretch"

    def _projector(self) -> nn.Module:
        return AfterMerging(super()._projector())

    @property
    def read_by(self) -> nn.Module:
        return self.projector.connector.patch_merger.merging_layer

    @property
    def merge(self) -> int:
        """Patches along each side of a token."""
        return self.config.spatial_merge_size

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        super().check(arguments, modality)
        pixels, sizes = arguments.get(modality.pixels), arguments.get("image_sizes")
        if pixels is None:
            return
        check_pixels(modality.pixels, pixels, 4, "(images, channels, height, width)")
        if sizes is None or torch.as_tensor(sizes).shape != (pixels.shape[0], 2):
            given = "is missing" if sizes is None else f"has shape {tuple(torch.as_tensor(sizes).shape)}"
            raise CaptureError(
                f"image_sizes {given}; pass it as the processor returns it: (height, width) of each of the "
                f"{pixels.shape[0]} images"
            )

    def grid(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        height, width = torch.as_tensor(arguments["image_sizes"][number]).tolist()
        patch = self.config.vision_config.patch_size
        return height // patch, width // patch

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
        return [part[None] for part in value.flatten(0, -2).split(lengths)]

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        cells = crops[0].T.unflatten(1, self.grid(modality, number, arguments))  # (channels, rows, cols)
        return nn.functional.avg_pool2d(cells, self.merge).flatten(1).T

    def projects_tokens(self, modality: Modality) -> bool:
        return True

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        rows, cols = (n // self.merge for n in grid)
        return ((rows, cols),)


class LightOnOcrAdapter(Mistral3Adapter):
    """LightOnOcrForConditionalGeneration."""

    model_type = "lighton_ocr"
    tower, connector = "vision_encoder", "vision_projection"
