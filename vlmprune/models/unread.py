# SPDX-License-Identifier: Apache-2.0
"""Families of whose vision tower nothing is read: methods see the features that the language model is given.

Aria, Idefics2 and DeepSeek-OCR 2 ask the patches of a picture by learned queries, whose answers stand for no
places in it. GOT-OCR 2 and PP-Chart2Table read one square picture by windows, with biases of places, and put
patches together by convolutions. MiniCPM-V 4.6 and MiniCPM-OCR merge patches in the middle of their tower,
Molmo 2 pools them by a table of its processor. The towers of Perception LM and Gemma 3n are of timm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.deferred import Checks
from ..core.method import Need, What, as_needs
from ..errors import CaptureError, UnsupportedError
from ..hooks.vision.capture import VisionCapture
from ..hooks.vision.pictures import Grids, Picture
from .base import IMAGE, VIDEO, Adapter, Modality, check_pixels, feature_list
from .refusals import refuse_clips
from .shrink import tiles_of

# what can be read without knowing the tower
_OF_FEATURES = ("features", "text_embeds")


class UnreadAdapter(Adapter):
    """Base: features of every picture, and, where known, the rows and columns that its tokens form."""

    unread: ClassVar[str]  # why its tower cannot be read

    def __init__(self, model: nn.Module) -> None:
        self._find_parts(model)
        self.projector = None
        self.cls = False

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        unknown = sorted({need.what for need in as_needs(needs)} - set(_OF_FEATURES))
        if unknown:
            raise UnsupportedError(
                f"{self.model_type!r} {self.unread}, so that {unknown} cannot be read of it; use a method "
                "that reads features only, e.g. 'divprune@64'"
            )
        return VisionCapture(self.vision_tower, (), ())

    def token_grids(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Grids:
        """Rows and columns that the tokens (N, D) of a picture form; () where they stand for no places."""
        return ()

    def marks(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
        """(N,) bool on the CPU, what the model put between tokens of a picture; None for nothing."""
        return None

    def pictures(
        self,
        modality: Modality,
        output: Any,
        arguments: Mapping[str, Any],
        found: Mapping[Need, Tensor],
        checks: Checks,
    ) -> list[Picture]:
        features = self.features(modality, output, arguments)
        return [
            Picture(
                one,
                self.token_grids(number, one, arguments),
                special=self.marks(number, one, arguments),
                view=self.view,
                parted=modality.name in self.parted,
            )
            for number, one in enumerate(features)
        ]


class AriaAdapter(UnreadAdapter):
    """AriaForConditionalGeneration."""

    model_type = "aria"
    view = "stretch"
    unread = "makes its tokens of a picture by learned queries"


class Idefics2Adapter(UnreadAdapter):
    """Idefics2ForConditionalGeneration: the tiles of an image are pictures of their own."""

    model_type = "idefics2"
    text, tower = "text_model", "vision_model"
    view = "stretch"
    unread = "makes its tokens of a picture by learned queries"

    def parts(self, processor: Any, picture: Any) -> int:
        # its quarters and the whole
        return 5 if processor.image_processor.do_image_splitting else 1

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        check_pixels(
            modality.pixels, arguments.get(modality.pixels), 5, "(rows, pictures, channels, height, width)"
        )

    def features(self, modality: Modality, output: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        # the model has one entry per row of the batch
        return list(torch.cat(feature_list(output)).split(self.inner.image_seq_len))


class DeepseekOcr2Adapter(UnreadAdapter):
    """DeepseekOcr2ForConditionalGeneration: tokens of crops of an image, of the whole image, and a mark."""

    model_type = "deepseek_ocr2"
    unread = "makes its tokens of a picture by learned queries"

    def marks(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        return torch.arange(features.shape[0]) == features.shape[0] - 1


class GotOcr2Adapter(UnreadAdapter):
    """GotOcr2ForConditionalGeneration: every crop is a picture of its own."""

    model_type = "got_ocr2"
    view = "stretch"
    unread = "attends inside windows, with biases of places"
    nests = False  # lists of lists are the pages of a document
    of_frames: ClassVar[Mapping[str, object]] = {"crop_to_patches": False}

    def parts(self, processor: Any, picture: Any) -> int:
        # its processor crops as it is told itself, whatever its image processor says
        options = getattr(processor, "images_kwargs", {"crop_to_patches": False})
        size = (picture.height, picture.width)
        return processor.image_processor.get_number_of_image_patches(*size, images_kwargs=dict(options))

    def token_grids(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Grids:
        side = round(features.shape[0] ** 0.5)
        return ((side, side),)


class PPChart2TableAdapter(GotOcr2Adapter):
    """Checkpoints whose config says pp_chart2table; their class is that of GOT-OCR 2."""

    model_type = "pp_chart2table"
    nests = True
    of_frames: ClassVar[Mapping[str, object]] = {}

    def parts(self, processor: Any, picture: Any) -> int:
        return 1


class MiniCpmVAdapter(UnreadAdapter):
    """MiniCPMV4_6ForConditionalGeneration: the slices of an image are pictures of their own."""

    model_type = "minicpmv4_6"
    modalities = (IMAGE, VIDEO)
    view = "stretch"
    unread = "merges patches in the middle of its tower"
    of_frames: ClassVar[Mapping[str, object]] = {"max_slice_nums": 1}

    def parts(self, processor: Any, picture: Any) -> int:
        images, size = processor.image_processor, (picture.height, picture.width)
        if not images.slice_mode:
            return 1
        grid = images.get_sliced_grid(size, images.max_slice_nums, images.scale_resolution)
        return 1 if grid is None else 1 + grid[0] * grid[1]

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        refuse_clips(self.model_type, "strings the frames of a clip together", modality, arguments)
        pixels, sizes = arguments.get(modality.pixels), arguments.get("target_sizes")
        check_pixels(modality.pixels, pixels, 4, "(1, channels, patch, patches of all images)")
        if pixels is not None and sizes is None:
            raise CaptureError(
                "target_sizes is missing; pass it as the processor returns it: (rows, columns) of patches of "
                "every image"
            )

    def token_grids(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Grids:
        rows, cols = torch.as_tensor(arguments["target_sizes"])[number].tolist()
        side = round((rows * cols / features.shape[0]) ** 0.5)
        return ((rows // side, cols // side),)


class MiniCpmOcrAdapter(MiniCpmVAdapter):
    """MiniCPMOcrForConditionalGeneration."""

    model_type = "minicpm_ocr"


class PerceptionLmAdapter(UnreadAdapter):
    """PerceptionLMForConditionalGeneration: the tiles of an image are pictures of their own.

    Clips are encoded by the method for images, so that nobody could tell them apart: what is found in the
    sequence is compared with what was encoded.
    """

    model_type = "perception_lm"
    unread = "has a tower of timm, whose attention is fused"
    of_frames: ClassVar[Mapping[str, object]] = {"vision_input_type": "vanilla"}
    checks_features = True

    def parts(self, processor: Any, picture: Any) -> int:
        return tiles_of(processor, (picture.height, picture.width))

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        check_pixels(
            modality.pixels, arguments.get(modality.pixels), 5, "(images, tiles, channels, height, width)"
        )

    def token_grids(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Grids:
        side = round(features.shape[0] ** 0.5)
        return ((side, side),)


class Gemma3nAdapter(UnreadAdapter):
    """Gemma3nForConditionalGeneration: layers read several states of each token, and something beside it."""

    model_type = "gemma3n"
    view = "stretch"
    unread = "has a tower of convolutions"
    aligned = ("per_layer_inputs",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        why = "whose layers hold several states of every token"
        self.closed = {"inside_lm": why, "attention": why, "decode": why}

    def token_grids(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Grids:
        side = round(features.shape[0] ** 0.5)
        return ((side, side),)


class Molmo2Adapter(UnreadAdapter):
    """Molmo2ForConditionalGeneration: tokens of the whole image, then of its crops; all attend both ways."""

    model_type = "molmo2"
    modalities = (IMAGE, VIDEO)
    view = "stretch"
    unread = "pools its patches by a table that the processor makes"
    parted = ("image",)  # a mark behind each row, and between the whole image and its crops
    text_type = 0  # tokens of pictures are 1
    types = "mm_token_type_ids"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if len(set(self.language_model.rope_types)) > 1:
            self.closed = {"inside_lm": "some of whose layers rotate by other angles than the rest"}

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        refuse_clips(self.model_type, "gives clips the placeholders of images", modality, arguments)
        if arguments.get(modality.pixels) is not None and arguments.get("image_grids") is None:
            raise CaptureError(
                "image_grids is missing; pass it as the processor returns it: (rows, columns) of tokens of "
                "every whole image and of its crops"
            )

    def features(self, modality: Modality, output: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        # the model adds them to the embedding of the placeholder
        embed = self.inner.get_input_embeddings()
        below = embed(torch.tensor(self.token_id(modality), device=embed.weight.device))
        return [one + below.to(one.device, one.dtype) for one in feature_list(output)]

    def token_grids(self, number: int, features: Tensor, arguments: Mapping[str, Any]) -> Grids:
        rows, cols, crop_rows, crop_cols = torch.as_tensor(arguments["image_grids"])[number].tolist()
        whole, crops = (rows, cols), (crop_rows, crop_cols)
        return (whole, crops) if crop_rows * crop_cols else (whole,)
