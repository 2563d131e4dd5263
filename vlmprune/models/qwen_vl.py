# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL to Qwen3.5 and their children: pictures of any size in one sequence, merged to tokens.

Tokens have places in their picture (M-RoPE), which a cut leaves as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.deferred import Checks
from ..core.method import Need, What, as_needs
from ..errors import CaptureError, UnsupportedError
from ..hooks.vision.capture import OF_PROJECTOR, VisionCapture
from ..hooks.vision.pictures import Picture
from .base import IMAGE, VIDEO, Modality, check_pixels
from .merging import MergingAdapter, per_picture
from .shrink import Resolution

GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


class Qwen2VLAdapter(MergingAdapter):
    """Qwen2VLForConditionalGeneration: images and clips; a frame of the grid is two frames of the clip."""

    model_type = "qwen2_vl"
    modalities: tuple[Modality, ...] = (IMAGE, VIDEO)
    towers: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_vl_vision")
    tower, connector = "visual", "visual.merger"
    positions = ("original",)
    view = "stretch"
    merges_first: ClassVar[bool] = False  # patches become tokens before the merger reads them

    @property
    def merge(self) -> int:
        return self.vision_tower.spatial_merge_size

    def cell(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> int:
        """Patches that make a token of a picture."""
        return self.merge**2

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        # it has no tiles
        return super().capture([need for need in as_needs(needs) if need.what != "tile_features"])

    def _thw(self, modality: Modality, arguments: Mapping[str, Any]) -> list[list[int]]:
        """(frames, rows, cols) of patches of every picture."""
        return torch.as_tensor(arguments[GRIDS[modality.name]]).tolist()

    def check(self, arguments: Mapping[str, Any], modality: Modality) -> None:
        pixels, name = arguments.get(modality.pixels), GRIDS[modality.name]
        check_pixels(modality.pixels, pixels, 2, "(patches, values)")
        if pixels is None:
            return
        if arguments.get(name) is None:
            raise CaptureError(
                f"{name} is missing; pass it as the processor returns it: frames, rows, columns of every "
                "picture"
            )
        grid = torch.as_tensor(arguments[name])
        if grid.ndim != 2 or grid.shape[1] != 3 or int(grid.prod(dim=1).sum()) != pixels.shape[0]:
            given = f"{grid.tolist()} for {modality.pixels} of shape {tuple(pixels.shape)}"
            raise CaptureError(
                f"{name}={given}; expected (frames, rows, columns) whose products sum to the patches"
            )

    def pictures(
        self,
        modality: Modality,
        output: Any,
        arguments: Mapping[str, Any],
        found: Mapping[Need, Tensor],
        checks: Checks,
    ) -> list[Picture]:
        name = GRIDS[modality.name]  # read many times, so it comes to the CPU once
        arguments = {**arguments, name: torch.as_tensor(arguments[name]).cpu()}
        return super().pictures(modality, output, arguments, found, checks)

    def crops(self, modality: Modality, arguments: Mapping[str, Any], total: int) -> list[int]:
        return [frames for frames, _, _ in self._thw(modality, arguments)]

    def grid(self, modality: Modality, number: int, arguments: Mapping[str, Any]) -> tuple[int, int]:
        _, rows, cols = self._thw(modality, arguments)[number]
        return rows, cols

    def divide(
        self,
        modality: Modality,
        need: Need,
        value: Tensor,
        counts: Sequence[int],
        arguments: Mapping[str, Any],
    ) -> Sequence[Tensor]:
        packed = value.flatten(0, -2)  # (S, channels) of patches, or of tokens where they are made first
        lengths = [frames * rows * cols for frames, rows, cols in self._thw(modality, arguments)]
        if need.what in OF_PROJECTOR and self.merges_first:
            lengths = [
                length // self.cell(modality, number, arguments) for number, length in enumerate(lengths)
            ]
        else:
            packed = self.in_order(packed, modality, arguments)
        return per_picture(packed, lengths, counts)

    def in_order(self, packed: Tensor, modality: Modality, arguments: Mapping[str, Any]) -> Tensor:
        """(S, channels) of all patches in the order of the pixels, where the tower works in another."""
        return packed

    def pack(self, modality: Modality, crops: Tensor, number: int, arguments: Mapping[str, Any]) -> Tensor:
        # the patches of a token follow each other, which is how the merger finds them
        cell = self.cell(modality, number, arguments)
        return crops.unflatten(1, (-1, cell)).mean(dim=2).flatten(0, 1)

    def resolution(self, processor: Any) -> Resolution:
        images = processor.image_processor

        def grid(picture: Any) -> tuple[int, int]:
            made = images(images=[picture], return_tensors="pt")
            _, rows, cols = made[GRIDS["image"]][0].tolist()
            return rows // self.merge, cols // self.merge

        def unchanged(pixels: int) -> dict[str, Any]:
            return {"images_kwargs": {"size": {**dict(images.size), "shortest_edge": pixels}}}

        return Resolution(images.patch_size * self.merge, grid, images.resample, unchanged)


class Qwen2_5VLAdapter(Qwen2VLAdapter):
    """Qwen2_5_VLForConditionalGeneration: most blocks of the tower attend inside windows of patches."""

    model_type = "qwen2_5_vl"
    towers: ClassVar[tuple[str, ...]] = ("qwen2_5_vl", "qwen2_5_vl_vision")

    def capture(self, needs: Sequence[Need | What]) -> VisionCapture:
        capture = super().capture(needs)
        full, count = sorted(self.vision_tower.fullatt_block_indexes), len(self.vision_tower.blocks)
        for need, block in capture.blocks_of.items():
            if need.what == "received_attention" and block not in full:
                raise UnsupportedError(
                    f"block {block} of this tower attends inside windows, whose scores cannot be compared; "
                    f"use one of layer={[index - count for index in full]}"
                )
        return capture

    def in_order(self, packed: Tensor, modality: Modality, arguments: Mapping[str, Any]) -> Tensor:
        tower, grid = self.vision_tower, torch.as_tensor(arguments[GRIDS[modality.name]])
        module = sys.modules[type(tower).__module__]
        if hasattr(tower, "get_window_index"):  # transformers before 5
            windows = tower.get_window_index(grid)[0]
        else:
            windows = module.get_vision_window_index(
                grid,
                spatial_merge_size=self.merge,
                window_size=tower.window_size,
                patch_size=tower.patch_size,
            )[0]
        # the tower works window by window; argsort of its order is the way back
        cells = packed.unflatten(0, (-1, self.merge**2))
        return cells[torch.argsort(windows.to(cells.device))].flatten(0, 1)


class Qwen3VLAdapter(Qwen2VLAdapter):
    """Qwen3VLForConditionalGeneration: features of early tower layers join after the first decoder layers.

    That is DeepStack. A row that a merging method makes is given those of the token whose place it takes.
    """

    model_type = "qwen3_vl"
    towers: ClassVar[tuple[str, ...]] = ("qwen3_vl", "qwen3_vl_vision")
    deepstack = "_deepstack_process"


class Cosmos3OmniAdapter(Qwen3VLAdapter):
    """Cosmos3OmniForConditionalGeneration, with the tower and the decoder of Qwen3-VL."""

    model_type = "cosmos3_omni"


class CohereCompassAdapter(Qwen3VLAdapter):
    """CohereCompassForConditionalGeneration: a tower like Qwen3-VL's in front of a decoder of Cohere's."""

    model_type = "cohere_compass"
    towers = ("cohere_compass_vision",)


class Qwen2_5OmniThinkerAdapter(Qwen2_5VLAdapter):
    """Qwen2_5OmniThinkerForConditionalGeneration, ``.thinker`` of the whole model; sounds stay."""

    model_type = "qwen2_5_omni_thinker"
    towers = ("qwen2_5_omni_vision_encoder",)


class Qwen3OmniMoeThinkerAdapter(Qwen3VLAdapter):
    """Qwen3OmniMoeThinkerForConditionalGeneration, likewise."""

    model_type = "qwen3_omni_moe_thinker"
    towers = ("qwen3_omni_moe_vision_encoder",)


class Qwen3VLMoeAdapter(Qwen3VLAdapter):
    """Qwen3VLMoeForConditionalGeneration: the same with experts in the decoder."""

    model_type = "qwen3_vl_moe"
    towers: ClassVar[tuple[str, ...]] = ("qwen3_vl_moe", "qwen3_vl_moe_vision")


class Qwen3_5Adapter(Qwen2VLAdapter):
    """Qwen3_5ForConditionalGeneration: most decoder layers keep a running state; there is no DeepStack."""

    model_type = "qwen3_5"
    towers: ClassVar[tuple[str, ...]] = ("qwen3_5", "qwen3_5_vision")


class Qwen3_5MoeAdapter(Qwen3_5Adapter):
    """Qwen3_5MoeForConditionalGeneration: the same with experts in the decoder."""

    model_type = "qwen3_5_moe"
    towers: ClassVar[tuple[str, ...]] = ("qwen3_5_moe", "qwen3_5_moe_vision")
