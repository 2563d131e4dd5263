# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT and LLaVA-OneVision in vLLM: an overview and tiles, with a newline behind each row, which always
stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models import llava_next as base
from vllm.model_executor.models import llava_onevision as onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...hooks.vision.pictures import CLS_FEATURES, Picture
from ...models.base import tile_grids
from ..request import Request
from .context import in_context
from .llava import OfLlava, PrunedLlava
from .processor import Grids

STRATEGY = "spatial_unpad"  # the only one that vLLM's classes use


class OfTiles(OfLlava):
    """What processors of both families say alike."""

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        size, config = items.get_image_size(index), self.info.ctx.model_config.hf_config
        down, across = get_anyres_image_grid_shape(
            (size.height, size.width), config.image_grid_pinpoints, config.vision_config.image_size
        )
        patches, rows = self.info._get_num_unpadded_features(
            original_height=size.height,
            original_width=size.width,
            npatches=self.side,
            num_patch_height=down,
            num_patch_width=across,
        )
        overview = (self.side, self.side)
        # of a very narrow picture the padding is all that there is beside it
        if patches == 0:
            return [(overview,)]
        # and all tiles as one block without their padding
        return [(overview, (rows, patches // rows))]


class PrunedTiles(PrunedLlava):
    """What is captured goes through vLLM's own packing, with NaN for newlines.

    Clips have no spec beside them and are left to vLLM's class.
    """

    packing: ClassVar[Any]  # the class of vLLM that packs

    def most_crops(self) -> int:
        size = self.config.vision_config.image_size
        # the overview, and the tiles of the largest canvas
        return 1 + max(
            (height // size) * (width // size) for height, width in self.config.image_grid_pinpoints
        )

    def encode(self, request: Request, **kwargs: Any) -> list[Picture]:
        pixels = self._parse_and_validate_image_input(**kwargs)
        # one (crops, n, D) per picture
        tiles, found = self.watched.run(request.needs, lambda: self._process_image_pixels(pixels))
        counts = [one.shape[0] for one in tiles]
        parts = {need: value.split(counts) for need, value in found.items()}
        return [
            self._picture(tiles[number], size, {need: part[number] for need, part in parts.items()})
            for number, size in enumerate(kwargs["image_sizes"])
        ]

    def _picture(self, tiles: Tensor, size: Tensor, found: dict[Any, Tensor]) -> Picture:
        n = self.side**2
        features = self._pack(size, tiles, self.image_newline)
        # zeros go through the packing: what comes back as NaN is a newline
        special = self._marked(size, torch.zeros(tiles.shape[0], n, 1))[:, 0].isnan()
        patches = (~special).nonzero()[:, 0].to(features.device)
        captured = {
            need: self._marked(size, value[:, value.shape[1] - n :].float())[patches].to(value.dtype)
            for need, value in found.items()
            if need != CLS_FEATURES
        }
        if CLS_FEATURES in found:
            captured[CLS_FEATURES] = found[CLS_FEATURES][: self._real(size), 0]
        return Picture(features, tile_grids(special, self.side), captured, special)

    def _marked(self, size: Tensor, crops: Tensor) -> Tensor:
        """(crops, n, channels) -> (length, channels), newlines NaN."""
        return self._pack(size, crops, crops.new_full(crops.shape[-1:], torch.nan))

    def _pack(self, size: Tensor, crops: Tensor, newline: Tensor) -> Tensor:
        # vLLM's method reads nothing else of its self, so that the newline can be another
        stand_in = SimpleNamespace(config=self.config, image_newline=newline)
        return self.packing._merge_image_patch_embeddings(stand_in, size, crops, strategy=STRATEGY)

    def _real(self, size: Sequence[int] | Tensor) -> int:
        """Crops of a picture without those that fill up a batch."""
        shape = get_anyres_image_grid_shape(
            torch.as_tensor(size).tolist(),
            self.config.image_grid_pinpoints,
            self.config.vision_config.image_size,
        )
        return 1 + shape[0] * shape[1]


class LlavaNextProcessor(OfTiles, base.LlavaNextMultiModalProcessor):
    """The processor of LLaVA-NeXT that promises fewer placeholders."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor,
    info=in_context(base.LlavaNextProcessingInfo),
    dummy_inputs=base.LlavaDummyInputsBuilder,
)
class LlavaNextForConditionalGeneration(PrunedTiles, base.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    packing = base.LlavaNextForConditionalGeneration


class LlavaOnevisionProcessor(OfTiles, onevision.LlavaOnevisionMultiModalProcessor):
    """The processor of LLaVA-OneVision that promises fewer placeholders for images."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor,
    info=in_context(onevision.LlavaOnevisionProcessingInfo),
    dummy_inputs=onevision.LlavaOnevisionDummyInputsBuilder,
)
class LlavaOnevisionForConditionalGeneration(PrunedTiles, onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision: too many tiles are scaled down."""

    packing = onevision.LlavaOnevisionForConditionalGeneration

    def _pack(self, size: Tensor, crops: Tensor, newline: Tensor) -> Tensor:
        stand_in = SimpleNamespace(config=self.config, image_newline=newline)
        return self.packing._merge_image_patch_embeddings(
            stand_in, size, crops, image_newline=newline, strategy=STRATEGY
        )
