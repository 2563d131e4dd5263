# SPDX-License-Identifier: Apache-2.0
"""Nemotron 3 Omni: packed pictures in front of a decoder whose layers attend, keep a state, or do neither.

The decoder stands below a causal language model, and the whole model encodes and merges by itself. Clips are
refused: their tokens stand at placeholders of images, and the model drops a part of them
(``video_pruning_rate``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.vision.pictures import Grids
from .base import IMAGE, VIDEO, Modality, check_beside, check_pixels, refuse_clips
from .unread import UnreadAdapter


class NemotronHOmniAdapter(UnreadAdapter):
    """NemotronH_Omni_Reasoning_V3: images; sounds stay as they are."""

    model_type = "nemotron_h_omni"
    modalities = (IMAGE, VIDEO)
    within, text = "", "language_model.model"
    tower = "vision_model"
    view = "stretch"
    unread = "packs pictures with tokens of its own between them"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        why = "few of whose layers attend, by a module that layers of every kind call the same"
        self.closed = {"inside_lm": why, "attention": why, "decode": why}

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        how = "gives clips the placeholders of images and drops a part of their tokens"
        refuse_clips(self.model_type, how, modality, arguments)
        pixels, grids = arguments.get(modality.pixels), arguments.get("image_grid_hw")
        check_pixels(modality.pixels, pixels, 2, "(patches of all images, values)")
        if pixels is not None:
            count = 0 if grids is None else len(grids)
            check_beside("image_grid_hw", grids, (count, 2), "(rows, columns) of patches of every image")

    def token_grids(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Grids:
        rows, cols = torch.as_tensor(arguments["image_grid_hw"])[number].tolist()
        side = round((rows * cols / features.shape[0]) ** 0.5)
        return ((rows // side, cols // side),)
