# SPDX-License-Identifier: Apache-2.0
"""Cohere Command A Vision, Aya Vision, LFM2-VL: the projector shuffles patches to tokens, then maps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.method import Need
from ..hooks.vision.capture import OF_PROJECTOR
from .base import Modality, check_pixels
from .internvl import ShufflingAdapter, TilingAdapter
from .merging import OfCells, gated_layers, two_layers
from .refusals import check_beside


class ShuffleInProjector(ShufflingAdapter):
    """Base of those whose projector shuffles first, then maps."""

    towers = ("siglip_vision_model",)
    view = "stretch"

    @property
    def norm(self) -> str | None:
        """The norm in front of the layers of the projector."""
        return None

    @staticmethod
    def layers_of(connector: Any, rows: Tensor) -> Tensor:
        """Rows (..., merge**2 * C) through the layers of the projector."""
        return gated_layers(connector, rows)

    def _projector(self) -> nn.Module:
        return OfCells(super()._projector(), self._after_shuffle)

    def _after_shuffle(self, connector: Any, rows: Tensor) -> Tensor:
        return self.layers_of(connector, rows if self.norm is None else getattr(connector, self.norm)(rows))

    @property
    def read_by(self) -> nn.Module:
        return getattr(self.projector.connector, self.norm or "linear_1")

    @property
    def merge(self) -> int:
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


class Cohere2VisionAdapter(TilingAdapter, ShuffleInProjector):
    """Cohere2VisionForConditionalGeneration: square tiles, each of which is a picture of its own."""

    model_type = "cohere2_vision"


class AyaVisionAdapter(Cohere2VisionAdapter):
    """AyaVisionForConditionalGeneration: the same with a norm in front."""

    model_type = "aya_vision"
    norm = "layernorm"


class Lfm2VlAdapter(ShuffleInProjector):
    """Lfm2VlForConditionalGeneration: pictures of any size, filled up to one length for the tower."""

    model_type = "lfm2_vl"
    towers = ("siglip2_vision_model",)

    layers_of = staticmethod(two_layers)
    of_frames: ClassVar[Mapping[str, object]] = {"do_image_splitting": False}

    def parts(self, processor: Any, picture: Any) -> int:
        images, size = processor.image_processor, {"height": picture.height, "width": picture.width}
        limits = {"min_tiles": images.min_tiles, "max_tiles": images.max_tiles}
        shape = {
            name: getattr(images, name)
            for name in (
                "max_image_tokens",
                "encoder_patch_size",
                "downsample_factor",
                "max_pixels_tolerance",
            )
        }
        splits = images.do_image_splitting and {*limits.values()} != {1}
        if not splits or not images._is_image_too_large(**size, **shape):
            return 1
        *_, tiles = images._get_grid_layout(**size, **limits, tile_size=images.tile_size)
        return tiles + (images.use_thumbnail and tiles != 1)

    @property
    def norm(self) -> str | None:
        return "layer_norm" if self.inner.multi_modal_projector.use_layer_norm else None

    def _shuffle(self, channels: Tensor) -> Tensor:
        return self.projector.connector.pixel_unshuffle(channels).flatten(1, 2)

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        pixels, shapes = arguments.get(modality.pixels), arguments.get("spatial_shapes")
        check_pixels(modality.pixels, pixels, 3, "(images, patches, values)")
        if pixels is None:
            return
        count = pixels.shape[0]
        what = f"(rows, columns) of patches of each of the {count} images"
        check_beside("spatial_shapes", shapes, (count, 2), what)

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
        cell = self.merge if need.what in OF_PROJECTOR else 1
        grids = [self.grid(modality, number, arguments) for number in range(len(counts))]
        padded = value.reshape(len(counts), -1, value.shape[-1])  # the projector reads all pictures as one
        return [
            padded[number : number + 1, : (rows // cell) * (cols // cell)]
            for number, (rows, cols) in enumerate(grids)
        ]
