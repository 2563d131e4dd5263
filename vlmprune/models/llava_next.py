# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: a base crop, then tiles put together to one unpadded image, a newline behind each row."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError
from .base import IMAGE, Adapter, Modality
from .shrink import Resolution, TileSizes


class LlavaNextAdapter(Adapter):
    """LlavaNextForConditionalGeneration; newlines are kept and not counted."""

    model_type = "llava_next"
    shortens = True
    tiled = True
    view = "stretch"

    def _geometry(self, name: str) -> Any:
        """A geometry function of the model's own module."""
        # each family has a copy of its own; this is the one that the model calls
        return getattr(sys.modules[type(self.inner).__module__], name)

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        super().check(arguments, modality)
        pixels, sizes = arguments.get(modality.pixels), arguments.get("image_sizes")
        if modality.name != "image" or pixels is None:
            return
        if sizes is None:
            raise CaptureError(
                "image_sizes is missing; pass it as the processor returns it: (height, width) of every image"
            )
        sizes = torch.as_tensor(sizes)
        if sizes.ndim != 2 or sizes.shape[1] != 2 or (pixels.ndim == 5 and len(sizes) != len(pixels)):
            given = f"{tuple(sizes.shape)} for pixel_values of shape {tuple(pixels.shape)}"
            raise CaptureError(f"image_sizes has shape {given}; expected (height, width) of every image")
        if bool((sizes < 1).any()):
            raise CaptureError(
                f"image_sizes={sizes.tolist()} has an image of size zero; drop it from the batch"
            )

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        count = self._geometry("image_size_to_num_patches")
        size = self.config.vision_config.image_size
        return [
            count(image_size=s, grid_pinpoints=self.config.image_grid_pinpoints, patch_size=size)
            for s in arguments["image_sizes"]
        ]

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        newline = torch.full(crops.shape[-1:], torch.nan, device=crops.device)
        size = [arguments["image_sizes"][number]]
        return self.inner.pack_image_features(
            [crops], size, image_newline=newline, **self._options(arguments)
        )[0][0]

    def _options(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        strategy = (
            arguments.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        )
        return {"vision_feature_select_strategy": strategy}

    def resolution(self, processor: Any) -> Resolution | TileSizes:
        points = [(int(rows), int(cols)) for rows, cols in self.config.image_grid_pinpoints]

        def sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
            """A picture as large as fits into each of the resolutions that it may be cut from."""
            scales = [min(rows / size[0], cols / size[1]) for rows, cols in points]
            smaller = [
                (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
                for scale in scales
                if scale < 1
            ]
            return [size, *smaller]

        def count(size: tuple[int, int], several: bool) -> int:
            shown = 2 if several else 1
            arguments = {"image_sizes": torch.tensor([size] * shown), "batch_num_images": [shown]}
            crops = self.crops(IMAGE, arguments, shown)[0]
            packed = self.pack(IMAGE, torch.zeros(crops, self.side**2, 1), 0, arguments)
            return int((~packed.isnan()).sum())

        return TileSizes(sizes, count, processor.image_processor.resample)

    def layout(self, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        shape = self._geometry("get_anyres_image_grid_shape")
        # the model counts tiles as (height, width)
        down, across = shape(
            arguments["image_sizes"][number],
            self.config.image_grid_pinpoints,
            self.config.vision_config.image_size,
        )
        return across, down
