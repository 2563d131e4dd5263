# SPDX-License-Identifier: Apache-2.0
"""Nemotron 3 Omni: packed pictures with their grids, and a decoder of layers of four kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backbones import MOE
from .base import OWN, VISION, Family, text_fields
from .layouts import Packed, Size
from .shared import BOS_ID, GRID, IMAGE_ID, IMAGE_SIZE, MERGE, PATCH_SIZE, VIDEO_ID

_KINDS = ("linear_attention", "moe", "full_attention", "mlp")  # of the decoder, in turns


class OfGrids(Packed):
    """Rows and columns of patches of every image; clips in steps of two frames, at placeholders of images."""

    mixes = False

    def __init__(self) -> None:
        super().__init__(patch=(3 * PATCH_SIZE**2,), typed=False)

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        found = super().images(sizes, images, random)
        return _without_frames(found) if found else {}

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        if not count:
            return {}
        grids = torch.nn.functional.pad(inputs["image_grid_hw"], (1, 0), value=1)
        return _without_frames(super().row({**inputs, "image_grid_thw": grids}, first, count))

    def clip(self, frames: int) -> list[int]:
        # step + 1 is the id of some byte, in place of the text of a time
        return [i for step in range(frames) for i in [step + 1, BOS_ID, *[IMAGE_ID] * GRID**2]]

    def videos(self, rows: int, frames: int, random: torch.Generator) -> dict[str, Tensor]:
        side = GRID * MERGE * PATCH_SIZE
        return {"pixel_values_videos": torch.randn(rows, frames, 2 * 3, side, side, generator=random)}

    def video_row(self, inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        return {"pixel_values_videos": inputs["pixel_values_videos"][i : i + 1]}


def _without_frames(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": found["pixel_values"], "image_grid_hw": found["image_grid_thw"][:, 1:]}


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    vision = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    vision |= {"mlp_ratio": 2.0, "patch_size": PATCH_SIZE, "max_img_size": 4 * IMAGE_SIZE}
    vision |= {"num_cls_tokens": 2, "num_registers": 1, "video_temporal_patch_size": 2}
    own: dict[str, Any] = {
        "layers_block_type": [_KINDS[layer % 4] for layer in range(layers)],
        "head_dim": 16,
    }
    own |= {"ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "chunk_size": 16}
    own |= {"moe_shared_expert_intermediate_size": 32}
    return {
        "vision_config": {"model_type": "radio", **vision},
        "text_config": {"model_type": "nemotron_h", **text_fields(layers), **MOE, **own, **overrides},
        "audio_config": None,
        "vision_hidden_size": VISION["hidden_size"],
        "projector_hidden_size": 48,
        "downsample_ratio": 1 / MERGE,
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "tie_word_embeddings": False,
    }


FAMILIES = (
    Family(
        "nemotron_h_omni",
        "NemotronH_Omni_Reasoning_V3",
        OfGrids(),
        (("own", "own"),),
        config,
        model="NemotronH_Omni_Reasoning_V3",
        config_prefix="NemotronH_Omni_Reasoning_V3_",
        towers=OWN,
        texts=OWN,
        hybrid=True,
    ),
)
