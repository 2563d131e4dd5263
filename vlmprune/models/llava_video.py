# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video and Video-LLaVA: children of LLaVA that read clips."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Need, What
from ..hooks.vision.capture import VisionCapture
from .base import IMAGE, VIDEO, Adapter, Modality, feature_list
from .llava_next import LlavaNextAdapter
from .merging import averaged


class LlavaNextVideoAdapter(LlavaNextAdapter):
    """LlavaNextVideoForConditionalGeneration: images as in LLaVA-NeXT, frames pooled before the projector."""

    model_type = "llava_next_video"
    modalities = (IMAGE, VIDEO)
    pools = ("video",)

    def _stride(self) -> int:
        return self.config.spatial_pool_stride

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        if modality.name == "video":
            return [arguments["pixel_values_videos"].shape[1]] * total
        return super().crops(modality, arguments, total)

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        if modality.name != "video":
            return super().pack(modality, crops, number, arguments)
        # scores are averaged over the cell that a token is made of, also where the model takes its maximum or
        # learned to pool
        return averaged(crops, (self.side, self.side), self._stride())

    def projects_tokens(self, modality: Modality) -> bool:
        return modality.name == "video"

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        if modality.name != "video":
            return super().grids(modality, special, crops, grid)
        return ((self.side // self._stride(),) * 2,) * crops


class VideoLlavaAdapter(Adapter):
    """VideoLlavaForConditionalGeneration: two towers, images and frames; their [CLS] tokens are read too."""

    model_type = "video_llava"
    modalities = (IMAGE, VIDEO)
    tower = "image_tower"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if "pixel_values" not in inspect.signature(self.inner.forward).parameters:  # older transformers
            self.modalities = (
                Modality("image", "get_image_features", "pixel_values_images", "image_token_id"),
                VIDEO,
            )

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        return VisionCapture((self.vision_tower, self.inner.video_tower), needs, self.layers, self.projector)

    def features(self, modality: Modality, output: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        frames = feature_list(output)  # (1 + n, D) each
        if modality.name != "video":
            return frames
        count = arguments["pixel_values_videos"].shape[1]
        return [torch.cat(frames[start : start + count]) for start in range(0, len(frames), count)]

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        return [arguments["pixel_values_videos"].shape[1] if modality.name == "video" else 1] * total

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        if modality.name != "video":
            return super().pack(modality, crops, number, arguments)
        # [CLS] in front of every frame
        return nn.functional.pad(crops, (0, 0, 1, 0), value=torch.nan).flatten(0, 1)

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        return (grid,) * crops
