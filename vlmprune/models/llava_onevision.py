# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: tiles, scaled down when there are too many; frames of a clip pooled to a quarter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError
from .base import IMAGE, VIDEO, Modality
from .llava_next import LlavaNextAdapter


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """LlavaOnevisionForConditionalGeneration: images, one crop each where a prompt has several, and clips."""

    model_type = "llava_onevision"
    modalities = (IMAGE, VIDEO)

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        super().check(arguments, modality)
        images, sizes = arguments.get("batch_num_images"), arguments.get("image_sizes")
        if images is not None and sizes is not None and sum(int(n) for n in images) != len(sizes):
            given = [int(n) for n in images]
            raise CaptureError(
                f"batch_num_images={given} counts {sum(given)}, image_sizes {len(sizes)}; give all of both"
            )

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        if modality.name == "video":
            return [arguments["pixel_values_videos"].shape[1]] * total
        images = arguments.get("batch_num_images")
        tiled = [True] * total if images is None else [int(n) == 1 for n in images for _ in range(int(n))]
        return [
            count if tile else 1
            for count, tile in zip(super().crops(modality, arguments, total), tiled, strict=True)
        ]

    def _options(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "vision_aspect_ratio": arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        }

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        if modality.name != "video":
            return super().pack(modality, crops, number, arguments)
        pooled = self.inner.apply_pooling(crops).flatten(0, 1)  # (frames * n', channels)
        return torch.cat([pooled, pooled.new_full((1, pooled.shape[1]), torch.nan)])

    def features(self, modality: Modality, output: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        found = super().features(modality, output, arguments)
        if modality.name == "video":  # before transformers 5.20 the newline is appended later
            newline, frames = self.inner.image_newline, arguments["pixel_values_videos"].shape[1]
            patches = frames * math.ceil(self.side / 2) ** 2
            found = [one if len(one) > patches else torch.cat([one, newline[None].to(one)]) for one in found]
        return found

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        if modality.name != "video":
            return super().grids(modality, special, crops, grid)
        side = math.ceil(self.side / 2)
        return ((side, side),) * crops
