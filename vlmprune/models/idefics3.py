# SPDX-License-Identifier: Apache-2.0
"""Idefics3 and SmolVLM: tiles are pictures of their own, with text between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.method import Need, What
from ..errors import UnsupportedError
from ..hooks.vision.capture import VisionCapture
from .base import Modality, check_pixels, feature_list
from .internvl import ShufflingAdapter
from .shrink import TileSizes, longest_edge, split_of


class Idefics3Adapter(ShufflingAdapter):
    """Idefics3ForConditionalGeneration.

    The tiles of an image and its overview are pictures of their own: the model itself knows no more of them.
    """

    model_type = "idefics3"
    towers = ("idefics3_vision", "smolvlm_vision")
    of_frames: ClassVar[Mapping[str, object]] = {"do_image_splitting": False}
    text, tower = "text_model", "vision_model"
    connector = "connector.modality_projection"  # what comes after the shuffle
    view = "stretch"
    tiled = True

    @property
    def merge(self) -> int:
        return self.config.scale_factor

    def parts(self, processor: Any, picture: Any) -> int:
        images = processor.image_processor
        return split_of(images, (picture.height, picture.width), images.size["longest_edge"])

    def resolution(self, processor: Any) -> TileSizes:
        return longest_edge(processor, self.inner.image_seq_len, self.model_type)

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        check_pixels(
            modality.pixels, arguments.get(modality.pixels), 5, "(rows, pictures, channels, height, width)"
        )
        mask = arguments.get("pixel_attention_mask")
        if mask is None or not self._reads_attention:
            return
        # (rows, pictures, pixels). Pictures that fill up a row are masked whole, and the model drops them; a
        # masked part stays
        pixels = mask.bool().flatten(2)
        if bool((pixels.any(dim=2) != pixels.all(dim=2)).any()):
            raise UnsupportedError(
                "pixel_attention_mask masks a part of a picture, which attention scores do not follow yet; "
                "process pictures with image splitting, or use a method without attention, e.g. 'divprune@32'"
            )

    _reads_attention = False

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        capture = super().capture(needs)
        self._reads_attention = bool(capture.readers)
        return capture

    def features(self, modality: Modality, output: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        """One entry per picture; the model has one per row of the batch."""
        return list(torch.cat(feature_list(output)).split(self.inner.image_seq_len))

    def _shuffle(self, channels: Tensor) -> Tensor:
        return self.inner.connector.pixel_shuffle(channels.flatten(1, 2), self.config.scale_factor)


class SmolVLMAdapter(Idefics3Adapter):
    """SmolVLMForConditionalGeneration; the frames of a clip are pictures of their own as well."""

    model_type = "smolvlm"
