# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: pictures of any size, each filled up to the longest, whose patches are averaged by their places.

Sliding layers of some checkpoints let the tokens of a picture attend both ways; small checkpoints give every
layer something of each token beside its hidden state, and share keys between layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.method import Need
from ..errors import CaptureError, UnsupportedError
from ..hooks.vision.capture import OF_PROJECTOR
from .base import IMAGE, VIDEO, Modality, check_pixels
from .merging import MergingAdapter, per_picture
from .refusals import check_beside, closed_by_sharing
from .shrink import Resolution

PLACES = {"image": "image_position_ids", "video": "video_position_ids"}


class Gemma4Adapter(MergingAdapter):
    """Gemma4ForConditionalGeneration: images and clips; sounds stay as they are."""

    model_type = "gemma4"
    modalities = (IMAGE, VIDEO)
    towers = ("gemma4_vision",)
    connector = "embed_vision"
    view = "stretch"
    text_type = 0  # images are 1, clips 2
    types = "mm_token_type_ids"
    parted = ("video",)  # the time of each frame

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.closed = closed_by_sharing(self.language_model.config)
        if self.language_model.config.hidden_size_per_layer_input:
            self.aligned, self.beside = ("per_layer_inputs",), ("per_layer_input",)

    @property
    def read_by(self) -> nn.Module:
        return self.projector.embedding_pre_projection_norm

    @property
    def merge(self) -> int:
        return self.config.vision_config.pooling_kernel_size

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        pixels, name = arguments.get(modality.pixels), PLACES[modality.name]
        check_pixels(modality.pixels, pixels, 3, "(images, patches, values)")
        if pixels is None:
            return
        images, patches = pixels.shape[:2]
        what = f"(column, row) of each of the {patches} patches of {images} images"
        check_beside(name, arguments.get(name), (images, patches, 2), what)
        if modality.name == "video" and arguments.get("num_frames_per_video") is None:
            raise CaptureError("num_frames_per_video is missing; pass it as the processor returns it")

    def _frames(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        if modality.name != "video":
            return [1] * total
        return [int(count) for count in arguments["num_frames_per_video"]]

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        return self._frames(modality, arguments, total)

    def grid(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        places = arguments[PLACES[modality.name]]
        counts = self._frames(modality, arguments, len(places))
        own = places[sum(counts[:number]) : sum(counts[: number + 1])]  # (frames, S, 2), -1: filled up
        sizes = (own.amax(dim=1) + 1).tolist()
        cols, rows = sizes[0]
        in_order = (own[..., 0] + own[..., 1] * cols)[:, : rows * cols]
        if any(size != sizes[0] for size in sizes) or bool(
            (in_order != torch.arange(rows * cols, device=own.device)).any()
        ):
            raise UnsupportedError(
                f"picture {number} has frames of several sizes {sizes}, or patches that do not stand row by "
                "row; pass them as the processor returns them"
            )
        return rows, cols

    def resolution(self, processor: Any) -> Resolution:
        images = processor.image_processor

        def grid(picture: Any) -> tuple[int, int]:
            made = images(images=[picture], return_tensors="pt")
            cols, rows = (made[PLACES["image"]][0].amax(dim=0) + 1).tolist()
            return rows // self.merge, cols // self.merge

        # it would make a picture as large as its own budget allows, so it is told to leave sizes alone
        options = {"images_kwargs": {"do_resize": False}}
        return Resolution(images.patch_size * self.merge, grid, images.resample, lambda pixels: options)

    def divide(
        self,
        modality: Modality,
        need: Need,
        value: Tensor,
        counts: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        grids = [self.grid(modality, number, arguments) for number in range(len(counts))]
        if need.what in OF_PROJECTOR:  # tokens of all pictures: (T, C)
            lengths = [
                frames * rows * cols // self.merge**2
                for frames, (rows, cols) in zip(counts, grids, strict=True)
            ]
            return per_picture(value.flatten(0, -2), lengths, counts)
        return [
            part[:, : rows * cols]
            for part, (rows, cols) in zip(value.split(list(counts)), grids, strict=True)
        ]
