# SPDX-License-Identifier: Apache-2.0
"""FastVLM: a hybrid tower of timm whose last stage attends over the tokens that the projector reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.method import Need, What
from ..hooks.vision.capture import VisionCapture
from .base import Adapter, Modality


class FastVlmAdapter(Adapter):
    """FastVlmForConditionalGeneration with a FastViT tower; needs timm."""

    model_type = "fast_vlm"
    towers = ("timm_wrapper",)

    @property
    def layers(self) -> list[int]:
        return [-1]

    @property
    def last_stage(self) -> nn.Module:
        return self.vision_tower.timm_model.stages[-1]

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        return VisionCapture(self.last_stage, needs, self.layers, self.projector)

    def grid(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        stride = self.vision_tower.timm_model.feature_info[-1]["reduction"]
        # every stage rounds up
        rows, cols = (-(-side // stride) for side in arguments[modality.pixels].shape[-2:])
        return rows, cols

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        return (grid,)
