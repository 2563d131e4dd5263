# SPDX-License-Identifier: Apache-2.0
"""Nemotron-H Omni: a RADIO tower, and a decoder of attention, Mamba and experts below a causal model.

The tower packs pictures of any size into one sequence, each behind tokens of its own, and attends to each
alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Need, What
from ..hooks.vision.capture import OF_PROJECTOR, VisionCapture
from ..hooks.vision.pictures import Picture
from .base import IMAGE, VIDEO, Modality, check_pixels
from .internvl import ShufflingAdapter
from .merging import per_picture
from .refusals import check_beside


class NemotronHOmniAdapter(ShufflingAdapter):
    """NemotronH_Omni_Reasoning_V3: images and clips; sounds stay as they are.

    A step of a clip is some frames of it. Where its config says so the model drops tokens of clips by itself
    (EVS), and their columns with them; methods choose among the rest.
    """

    model_type = "nemotron_h_omni"
    # the two never stand in one call, which has one placeholder for both
    modalities = (IMAGE, replace(VIDEO, token="image_token_id"))
    within, text = "", "language_model.model"
    tower = "vision_model"
    towers = ("radio",)
    view = "stretch"
    parted = ("video",)  # marks and the time of each step
    compresses = ("video",)
    takes_columns = True

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
        pixels, grids = arguments.get(modality.pixels), arguments.get("image_grid_hw")
        if modality.name == "video":
            check_pixels(modality.pixels, pixels, 5, "(clips, steps, channels of a step, height, width)")
            return
        check_pixels(modality.pixels, pixels, 2, "(patches of all images, values)")
        if pixels is not None:
            count = 0 if grids is None else len(grids)
            check_beside("image_grid_hw", grids, (count, 2), "(rows, columns) of patches of every image")

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        if modality.name == "image":
            return super().crops(modality, arguments, total)
        return [arguments[modality.pixels].shape[1]] * total

    def leaves(
        self, modality: Modality, pictures: Sequence[Picture], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor] | None:
        rate = self.inner.video_pruning_rate
        if not rate > 0:
            return None
        own = sys.modules[type(self.inner).__module__].compute_retention_mask
        return [own(one.features.detach(), len(one.grids), rate).cpu() for one in pictures]

    def grid(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        if modality.name == "video":
            height, width = arguments[modality.pixels].shape[-2:]
            size = self.config.vision_config.patch_size
            return height // size, width // size
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
        if modality.name == "video":
            return super().divide(modality, need, value, counts, arguments)
        cell = self.merge**2 if need.what in OF_PROJECTOR else 1
        lengths = [rows * cols // cell for rows, cols in torch.as_tensor(arguments["image_grid_hw"]).tolist()]
        return per_picture(value.flatten(0, -2), lengths, counts)

    def _shuffle(self, channels: Tensor) -> Tensor:
        return self.inner.pixel_shuffle(channels, scale_factor=self.config.downsample_ratio).flatten(1, 2)
