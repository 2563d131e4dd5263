# SPDX-License-Identifier: Apache-2.0
"""Families that read packed pictures as Qwen-VL does, with a projector beside their tower.

Patches are in the order of the tokens that they become (EXAONE, HyperCLOVA X, LFM3-VL, Cosmos 3 Edge, ERNIE),
or row by row (PaddleOCR-VL, Kimi).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.method import Need
from ..errors import CaptureError
from ..hooks.vision.capture import OF_PROJECTOR
from ..hooks.vision.pictures import Picture
from .base import Modality
from .merging import OfCells, averaged, normed_patches, two_layers
from .qwen_vl import Qwen2_5VLAdapter, Qwen2VLAdapter
from .refusals import refuse_clips

_BOTH: Any = ("compact", "original")  # positions that count tokens, where Qwen-VL's are places in pictures


class Exaone4_5Adapter(Qwen2_5VLAdapter):
    """Exaone4_5_ForConditionalGeneration: the tower of Qwen2.5-VL with fewer keys than queries."""

    model_type = "exaone4_5"
    towers = ("exaone4_5_vision",)
    positions = _BOTH


class HyperClovaXVisionAdapter(Qwen2_5VLAdapter):
    """HyperCLOVAXVisionV2ForConditionalGeneration: one more linear layer behind the tower of Qwen2.5-VL."""

    model_type = "hyperclovax_vision_v2"
    numbers_padding = True
    towers = ("qwen2_5_vl_vision",)
    tower, connector = "vision_model", "projector"
    positions = _BOTH
    merges_first = True


class Lfm3VlAdapter(Qwen2VLAdapter):
    """Lfm3VlForConditionalGeneration: blocks with convolutions between those with attention."""

    model_type = "lfm3_vl"
    towers = ("lfm3_vl_vision",)
    tower, connector = "vision_tower", "multi_modal_projector"
    positions = _BOTH
    parted = ("video",)  # the time of each frame

    @property
    def layers(self) -> list[int]:
        # the last block that attends: what comes behind it mixes neighbours only
        kinds = self.config.vision_config.layer_types
        return [max(number for number, kind in enumerate(kinds) if kind != "conv") - len(kinds)]


class Cosmos3EdgeAdapter(Qwen2VLAdapter):
    """Cosmos3EdgeForConditionalGeneration."""

    model_type = "cosmos3_edge"
    towers = ("cosmos3_edge_vision",)
    connector = "projector"


class StillAdapter(Qwen2VLAdapter):
    """Base of families whose projector reads the patches of a token at once; clips are refused."""

    by_rows: ClassVar[bool] = False  # whether the tower reads patches row by row, not token by token
    gives_cells: ClassVar[bool] = False  # whether it puts those of a token side by side when it ends
    clips: ClassVar[str] = "reads no clips"  # what happens to them, for the refusal

    @staticmethod
    def project(connector: Any, rows: Tensor) -> Tensor:
        """Rows (..., merge**2 * C) of the patches of tokens to rows (..., D) of the language model."""
        raise NotImplementedError

    def _projector(self) -> nn.Module:
        return OfCells(super()._projector(), self.project)

    @property
    def read_by(self) -> nn.Module:
        return self.projector.connector

    @property
    def merge(self) -> int:
        return self.config.vision_config.spatial_merge_size

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        refuse_clips(self.model_type, self.clips, modality, arguments)
        super().check(arguments, modality)

    def divide(
        self,
        modality: Modality,
        need: Need,
        value: Tensor,
        counts: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        parts = super().divide(modality, need, value, counts, arguments)
        if need.what not in OF_PROJECTOR:
            return parts
        return [self._cells(part, modality, number, arguments) for number, part in enumerate(parts)]

    def _cells(
        self, patches: Tensor, modality: Modality, number: int, arguments: Mapping[str, Any]
    ) -> Tensor:
        """(frames, n, C) patches to (frames, N, merge**2 * C), those of a token side by side."""
        if self.gives_cells or not self.by_rows:
            return patches.unflatten(1, (-1, self.merge**2)).flatten(2)
        rows, cols = (n // self.merge for n in self.grid(modality, number, arguments))
        apart = patches.unflatten(1, (rows, self.merge, cols, self.merge)).transpose(2, 3)
        # (frames, rows, cols, merge, merge, C)
        return apart.reshape(patches.shape[0], rows * cols, -1)

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        if not self.by_rows:
            return super().pack(modality, crops, number, arguments)
        return averaged(crops, self.grid(modality, number, arguments), self.merge)


class PaddleOcrVlAdapter(StillAdapter):
    """PaddleOCRVLForConditionalGeneration: it reads no clips."""

    model_type = "paddleocr_vl"
    modalities = Qwen2VLAdapter.modalities[:1]
    # older transformers call its tower like the whole
    towers = ("paddleocr_vl_vision", "paddleocr_vl")
    connector = "projector"
    by_rows = True

    @staticmethod
    def project(connector: Any, rows: Tensor) -> Tensor:
        return two_layers(connector, normed_patches(connector.pre_norm, rows))


class Ernie4_5VlMoeAdapter(StillAdapter):
    """Ernie4_5_VLMoeForConditionalGeneration: experts of text and of pictures, told apart by token types."""

    model_type = "ernie4_5_vl_moe"
    towers = ("ernie4_5_vl_moe_vision",)
    tower, connector = "vision_tower", "resampler_model"
    aligned = beside = ("moe_mm_token_type_ids",)
    clips = "puts two frames of a clip into one"

    @staticmethod
    def project(connector: Any, rows: Tensor) -> Tensor:
        # a picture is a clip of one frame, which is taken twice
        lead = rows.shape[:-1]
        merged = connector.spatial_linear(rows.reshape(-1, rows.shape[-1]))
        twice = connector.temporal_linear(merged.repeat(1, connector.temporal_merge_size))
        return connector.after_norm(connector.mlp(twice)).reshape(*lead, -1)


class KimiK25Adapter(StillAdapter):
    """Kimi_K25ForConditionalGeneration: a decoder with latent keys."""

    model_type = "kimi_k25"
    towers = ("kimi_k25_vision",)
    tower, connector = "vision_tower", "mm_projector"
    positions = _BOTH
    by_rows = gives_cells = True
    clips = "averages the frames of a clip"

    @staticmethod
    def project(connector: Any, rows: Tensor) -> Tensor:
        normed = normed_patches(connector.pre_norm, rows)
        return connector.out_proj(connector.act(connector.in_proj(normed)))

    @property
    def merge(self) -> int:
        return self.config.vision_config.merge_kernel_size[0]


class VideoLlama3Adapter(Qwen2VLAdapter):
    """VideoLlama3ForConditionalGeneration: every picture says how many of its patches make a token.

    Of a clip it may leave out patches that hardly change from frame to frame, which the processor says by
    ``video_compression_mask``; methods choose among the rest.
    """

    model_type = "video_llama_3"
    towers = ("video_llama_3_vision",)
    tower, connector = "vision_model", "projector"
    positions = _BOTH
    parted = ("video",)  # the time of each frame
    compresses = ("video",)
    merges_first = True

    def leaves(
        self, modality: Modality, pictures: Sequence[Picture], arguments: Mapping[str, Any]
    ) -> Sequence[Tensor] | None:
        mask = arguments.get("video_compression_mask")
        if mask is None:
            return None
        lengths = [picture.length for picture in pictures]
        if mask.shape != (sum(lengths),):
            raise CaptureError(
                f"video_compression_mask has shape {tuple(mask.shape)}; expected one entry for each of "
                f"{sum(lengths)} tokens of {len(pictures)} clips, as the processor returns it"
            )
        return mask.to("cpu", torch.bool).split(lengths)

    def cell(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> int:
        return int(arguments[f"{modality.name}_merge_sizes"][number]) ** 2

    def grids(
        self, modality: Modality, special: Tensor, crops: int, grid: tuple[int, int]
    ) -> tuple[tuple[int, int], ...]:
        rows, cols = grid
        side = round((crops * rows * cols / special.shape[0]) ** 0.5)
        return ((rows // side, cols // side),) * crops
