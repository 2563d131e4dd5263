# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H Omni: a RADIO tower, and a decoder of attention, Mamba and experts below a causal model.

The tower packs pictures of any size into one sequence, each behind tokens of its own, and attends to each
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Need, What
from ..hooks.vision.capture import OF_PROJECTOR, VisionCapture
from .base import IMAGE, VIDEO, Modality, check_beside, check_pixels, refuse_clips
from .internvl import ShufflingAdapter
from .merging import per_picture


class NemotronHOmniAdapter(ShufflingAdapter):
    """NemotronH_Omni_Reasoning_V3: images; sounds stay as they are."""

    model_type = "nemotron_h_omni"
    modalities = (IMAGE, VIDEO)
    within, text = "", "language_model.model"
    tower = "vision_model"
    towers = ("radio",)
    view = "stretch"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        why = "few of whose layers attend, by a module that layers of every kind call the same"
        self.closed = {"inside_lm": why, "attention": why, "decode": why}

    @property
    def merge(self) -> int:
        return round(1 / self.config.downsample_ratio)

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        capture = super().capture(needs)
        # one token for each model that the tower was trained after, none of which is the [CLS]; and registers
        capture.prefix = self.config.vision_config.num_summary_tokens
        return capture

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        how = "gives clips the placeholders of images and drops a part of their tokens"
        refuse_clips(self.model_type, how, modality, arguments)
        pixels, grids = arguments.get(modality.pixels), arguments.get("image_grid_hw")
        check_pixels(modality.pixels, pixels, 2, "(patches of all images, values)")
        if pixels is not None:
            count = 0 if grids is None else len(grids)
            check_beside("image_grid_hw", grids, (count, 2), "(rows, columns) of patches of every image")

    def grid(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        rows, cols = torch.as_tensor(arguments["image_grid_hw"])[number].tolist()
        return rows, cols

    def divide(
        self,
        modality: Modality,
        need: Need,
        value: Tensor,
        counts: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        cell = self.merge**2 if need.what in OF_PROJECTOR else 1
        lengths = [rows * cols // cell for rows, cols in torch.as_tensor(arguments["image_grid_hw"]).tolist()]
        return per_picture(value.flatten(0, -2), lengths, counts)

    def _shuffle(self, channels: Tensor) -> Tensor:
        return self.inner.pixel_shuffle(channels, scale_factor=self.config.downsample_ratio).flatten(1, 2)
