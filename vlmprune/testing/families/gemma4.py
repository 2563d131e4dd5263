# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: pictures of any size, filled up to the longest, with the place of every patch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import OWN, VISION, Family, text_config
from .layouts import Layout, Size
from .shared import GRID, IMAGE_ID, MERGE, PATCH_SIZE, VIDEO_ID

_LONGEST = 160  # patches that every picture is filled up to
_NAMES = ("pixel_values", "image_position_ids")


class Placed(Layout):
    """Patches in rows beside their places (column, row), -1 where nothing is."""

    sizes = ((168, 168), (112, 280), (280, 112))

    def __init__(self) -> None:
        super().__init__(MERGE, (GRID**2, 0))

    def grid(self, size: Size) -> tuple[int, int]:
        rows, cols = (side // PATCH_SIZE for side in size)
        return rows, cols

    def block(self, size: Size, alone: bool) -> list[int]:
        return [IMAGE_ID] * (math.prod(self.grid(size)) // MERGE**2)

    def _filled(self, grids: Sequence[tuple[int, int]], random: torch.Generator) -> tuple[Tensor, Tensor]:
        pixels = torch.zeros(len(grids), _LONGEST, 3 * PATCH_SIZE**2)
        places = torch.full((len(grids), _LONGEST, 2), -1)
        for number, (rows, cols) in enumerate(grids):
            count = rows * cols
            pixels[number, :count] = torch.randn(count, pixels.shape[-1], generator=random)
            places[number, :count, 0] = torch.arange(count) % cols
            places[number, :count, 1] = torch.arange(count) // cols
        return pixels, places

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        if not sizes:
            return {}
        return dict(zip(_NAMES, self._filled([self.grid(size) for size in sizes], random), strict=True))

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        return {name: inputs[name][first : first + count] for name in _NAMES} if count else {}

    def clip(self, frames: int) -> list[int]:
        # a time before each frame
        return [i for frame in range(frames) for i in [frame + 1, *[VIDEO_ID] * GRID**2]]

    def videos(self, rows: int, frames: int, random: torch.Generator) -> dict[str, Tensor]:
        side = GRID * MERGE
        # frames of all clips one after the other, (rows * frames, patches, channels)
        pixels, places = self._filled([(side, side)] * (rows * frames), random)
        counts = torch.full((rows,), frames)
        return {
            "pixel_values_videos": pixels,
            "video_position_ids": places,
            "num_frames_per_video": counts,
        }

    def video_row(self, inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        counts = inputs["num_frames_per_video"].tolist()
        # frames of this clip, behind those of the clips before
        own = slice(sum(counts[:i]), sum(counts[: i + 1]))
        names = ("pixel_values_videos", "video_position_ids")
        return {name: inputs[name][own] for name in names} | {
            "num_frames_per_video": inputs["num_frames_per_video"][i : i + 1]
        }

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        # 0 text, 1 image, 2 clip
        return {"mm_token_type_ids": (ids == IMAGE_ID).int() + 2 * (ids == VIDEO_ID).int()}


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    vision: dict[str, Any] = {**VISION, "num_key_value_heads": 4, "head_dim": 8, "patch_size": PATCH_SIZE}
    vision |= {"pooling_kernel_size": MERGE, "position_embedding_size": 64}
    return {
        "vision_config": vision,
        "text_config": text_config(text, layers, overrides),
        "audio_config": None,  # no tower for sounds
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "tie_word_embeddings": False,
    }


FAMILIES = (
    Family(
        "gemma4",
        "Gemma4",
        Placed(),
        (("own", "gemma4"), ("own", "gemma4_small"), ("own", "gemma4_unshared")),
        config,
        towers=OWN,
        texts=("gemma4", "gemma4_small", "gemma4_unshared"),
    ),
)
