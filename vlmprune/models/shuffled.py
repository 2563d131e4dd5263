# SPDX-License-Identifier: Apache-2.0
"""Cohere Command A Vision, Aya Vision, LFM2-VL: the projector shuffles patches to tokens, then maps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Need
from ..errors import CaptureError
from ..hooks.vision.capture import OF_PROJECTOR
from .base import Adapter, Modality, Part, check_pixels
from .internvl import shuffled_mean


class AfterShuffle(nn.Module):
    """What a projector does with the shuffled patches of a token: rows (..., factor**2 * C) to (..., D)."""

    def __init__(self, connector: nn.Module, norm: str | None, gated: bool) -> None:
        super().__init__()
        self.connector: Part = connector
        self.norm, self.gated = norm, gated

    @property
    def first(self) -> nn.Module:
        """What reads these rows."""
        return self.connector.linear_1 if self.norm is None else getattr(self.connector, self.norm)

    def forward(self, rows: Tensor) -> Tensor:
        connector = self.connector
        hidden = connector.linear_1(rows if self.norm is None else self.first(rows))
        if not self.gated:
            return connector.linear_2(connector.act(hidden))
        value, gate = hidden.chunk(2, dim=-1)
        return connector.linear_2(connector.act(gate) * value)


class Cohere2VisionAdapter(Adapter):
    """Cohere2VisionForConditionalGeneration: square tiles, each of which is a picture of its own."""

    model_type = "cohere2_vision"
    towers = ("siglip_vision_model",)
    view = "stretch"

    def _projector(self) -> nn.Module:
        return AfterShuffle(super()._projector(), None, gated=True)

    @property
    def read_by(self) -> nn.Module:
        return self.projector.first

    @property
    def factor(self) -> int:
        """Patches along each side of a token."""
        return self.config.downsample_factor

    def _shuffle(self, channels: Tensor) -> Tensor:
        return self.projector.connector.pixel_shuffle(channels.flatten(1, 2)).flatten(1, 2)

    def divide(
        self,
        modality: Modality,
        need: Need,
        value: Tensor,
        counts: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        # rows of the projector: (T, rows, cols, channels)
        value = value.flatten(1, -2) if need.what in OF_PROJECTOR else value
        return super().divide(modality, need, value, counts, arguments)

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        return shuffled_mean(crops[0], self.grid(modality, number, arguments), self._shuffle)

    def projects_tokens(self, modality: Modality) -> bool:
        return True

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        rows, cols = (n // self.factor for n in grid)
        return ((rows, cols),)


class AyaVisionAdapter(Cohere2VisionAdapter):
    """AyaVisionForConditionalGeneration: the same with a norm in front."""

    model_type = "aya_vision"

    def _projector(self) -> nn.Module:
        return AfterShuffle(self.inner.multi_modal_projector, "layernorm", gated=True)


class Lfm2VlAdapter(Cohere2VisionAdapter):
    """Lfm2VlForConditionalGeneration: pictures of any size, filled up to one length for the tower."""

    model_type = "lfm2_vl"
    towers = ("siglip2_vision_model",)

    def _projector(self) -> nn.Module:
        norm = "layer_norm" if self.inner.multi_modal_projector.use_layer_norm else None
        return AfterShuffle(self.inner.multi_modal_projector, norm, gated=False)

    def _shuffle(self, channels: Tensor) -> Tensor:
        return self.projector.connector.pixel_unshuffle(channels).flatten(1, 2)

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        pixels, shapes = arguments.get(modality.pixels), arguments.get("spatial_shapes")
        check_pixels(modality.pixels, pixels, 3, "(images, patches, values)")
        if pixels is None:
            return
        if shapes is None or torch.as_tensor(shapes).shape != (pixels.shape[0], 2):
            given = "is missing" if shapes is None else f"has shape {tuple(torch.as_tensor(shapes).shape)}"
            raise CaptureError(
                f"spatial_shapes {given}; pass it as the processor returns it: (rows, columns) of patches of "
                f"each of the {pixels.shape[0]} images"
            )

    def grid(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        rows, cols = torch.as_tensor(arguments["spatial_shapes"])[number].tolist()
        return rows, cols

    def divide(
        self,
        modality: Modality,
        need: Need,
        value: Tensor,
        counts: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        cell = self.factor if need.what in OF_PROJECTOR else 1
        grids = [self.grid(modality, number, arguments) for number in range(len(counts))]
        padded = value.reshape(len(counts), -1, value.shape[-1])  # the projector reads all pictures as one
        return [
            padded[number : number + 1, : (rows // cell) * (cols // cell)]
            for number, (rows, cols) in enumerate(grids)
        ]
