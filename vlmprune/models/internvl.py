# SPDX-License-Identifier: Apache-2.0
"""InternVL and Qianfan-OCR: patches are shuffled, four to a token as released, before the projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.method import Need, What, as_needs
from ..errors import UnsupportedError
from ..hooks.vision.capture import VisionCapture
from .base import Modality
from .merging import MergingAdapter
from .shrink import TileSizes, square_tiles, tiles_of


class ShufflingAdapter(MergingAdapter):
    """Base of families that shuffle the patches of a token side by side, by a function of their own."""

    def _shuffle(self, channels: Tensor) -> Tensor:
        """(crops, rows, cols, C) of patches -> (crops, tokens, merge**2 * C)."""
        raise NotImplementedError

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        grid = self.grid(modality, number, arguments)
        return torch.cat([shuffled_mean(crop, grid, self._shuffle) for crop in crops])


class TilingAdapter(MergingAdapter):
    """Base of families whose processor cuts a picture into square tiles that the model takes for pictures."""

    tiled = True

    def parts(self, processor: Any, picture: Any) -> int:
        return tiles_of(processor, (picture.height, picture.width))

    def resolution(self, processor: Any) -> TileSizes:
        return square_tiles(processor, (self.side // self.merge) ** 2)


class InternVLAdapter(TilingAdapter, ShufflingAdapter):
    """InternVLForConditionalGeneration.

    Tiles, the thumbnail and the frames of a clip are pictures of their own: the model itself knows no more of
    them.
    """

    model_type = "internvl"
    towers = ("internvl_vision",)
    of_frames: ClassVar[Mapping[str, object]] = {"crop_to_patches": False}
    view = "stretch"

    @property
    def side(self) -> int:
        vision = self.config.vision_config
        return vision.image_size[0] // vision.patch_size[0]

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        if Need("cls_features") in as_needs(needs):
            raise UnsupportedError(
                f"the projector of {self.model_type} reads four shuffled patches at once, so a [CLS] token "
                "cannot pass it: use cls='mean', e.g. visionzip(cls='mean')"
            )
        return super().capture(needs)

    @property
    def merge(self) -> int:
        return round(1 / self.config.downsample_ratio)

    def _shuffle(self, channels: Tensor) -> Tensor:
        return self.inner.pixel_shuffle(channels, scale_factor=self.config.downsample_ratio).flatten(1, 2)


class QianfanOcrAdapter(InternVLAdapter):
    """QianfanOCRForConditionalGeneration, built as InternVL is."""

    model_type = "qianfan_ocr"
    towers = ("qianfan_ocr_vision",)


def shuffled_mean(patches: Tensor, grid: tuple[int, int], shuffle: Any) -> Tensor:
    """(n, channels) of patches -> (N, channels): the mean of those that ``shuffle`` puts into a token.

    ``shuffle`` is the model's own, from (crops, rows, cols, 1) to (crops, N, r); a channel goes as a crop.
    """
    return shuffle(patches.T.unflatten(1, grid)[..., None]).mean(dim=-1).T
