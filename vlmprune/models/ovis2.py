# SPDX-License-Identifier: Apache-2.0
"""Ovis2: each token is a mixture over a vocabulary of visual words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..core.method import Need, What, as_needs
from ..errors import UnsupportedError
from ..hooks.vision.capture import VisionCapture
from .base import Modality, Part
from .merging import MergingAdapter, averaged


class SoftVocabulary(nn.Module):
    """From the patches of a token, rows (..., stride**2 * C), to its mixture of visual words (..., D)."""

    def __init__(self, tower: nn.Module, table: nn.Module) -> None:
        super().__init__()
        self.tower: Part = tower
        self.table: Part = table

    def forward(self, rows: Tensor) -> Tensor:
        shares = self.tower.head_norm(self.tower.head_linear(rows)).softmax(dim=-1)
        # the last words of the table mark where a picture begins and ends
        return shares @ self.table.weight[: shares.shape[-1]]


class Ovis2Adapter(MergingAdapter):
    """Ovis2ForConditionalGeneration: square tiles, each of which is a picture of its own.

    Tokens that mark the beginning and the end of pictures are no part of them, so they stay.
    """

    model_type = "ovis2"
    # older transformers do not name its tower
    towers = ("ovis2_vision", "")
    view = "stretch"

    def _projector(self) -> nn.Module:
        return SoftVocabulary(self.vision_tower, self.inner.visual_embeddings_table)

    @property
    def read_by(self) -> nn.Module:
        return self.vision_tower.head_linear

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        how = self.config.vision_config.tokenize_function
        if how != "softmax" and any(need.what == "projector" for need in as_needs(needs)):
            raise UnsupportedError(
                f"this ovis2 takes visual words by {how!r}, which is no smooth function of a patch; use a "
                "method that does not run the projector, e.g. 'divprune@64'"
            )
        return super().capture(needs)

    @property
    def merge(self) -> int:
        return self.config.vision_config.hidden_stride

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        # a side that does not divide was filled up with zeros, which are no patches
        return averaged(crops, self.grid(modality, number, arguments), self.merge, filled=True)

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        rows, cols = (-(-n // self.merge) for n in grid)
        return ((rows, cols),)
