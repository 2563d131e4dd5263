# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision: tiles as in LLaVA-NeXT, and features of several layers of the tower.

Each is added in another layer of the decoder. A cut takes the columns of pictures and all these features
along. What methods see are the features of the first layer that adds some.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.vision.pictures import Grids
from .base import IMAGE, Modality, tile_grids
from .llava_next import LlavaNextAdapter
from .unread import UnreadAdapter


class Granite4VisionAdapter(UnreadAdapter, LlavaNextAdapter):
    """Granite4VisionForConditionalGeneration; newlines are kept and not counted."""

    model_type = "granite4_vision"
    shortens = False
    unread = "asks windows of patches of several layers by learned queries"
    added = ("vision_mask", "deepstack_features")

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.closed = {"inside_lm": "whose layers add features to tokens of the uncut sequence"}

    @property
    def tokens_per_side(self) -> int:
        """Of every crop."""
        return int(self.side * Fraction(self.config.downsample_rate))

    def features(self, modality: Modality, output: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        first = min(layer for layer, _ in output.deepstack_features)
        # where two are for one layer the model takes the later one
        return list([packed for layer, packed in output.deepstack_features if layer == first][-1])

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        newline = torch.full(crops.shape[-1:], torch.nan, device=crops.device)
        size = [arguments["image_sizes"][number]]
        return self.inner.pack_image_features(
            [crops], size, image_newline=newline, **self._options(arguments)
        )[0]

    def marks(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
        count = self.crops(IMAGE, arguments, number + 1)[number]
        packed = self.pack(IMAGE, torch.zeros(count, self.tokens_per_side**2, 1), number, arguments)
        newlines = packed[:, 0].isnan()
        return newlines if bool(newlines.any()) else None

    def token_grids(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Grids:
        marks = self.marks(number, features, arguments)
        return () if marks is None else tile_grids(marks, self.tokens_per_side)
