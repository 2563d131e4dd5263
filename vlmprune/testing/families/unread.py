# SPDX-License-Identifier: Apache-2.0
"""Aria, Idefics2, GOT-OCR 2, PP-Chart2Table, MiniCPM: families of whose tower nothing is read.

Others of them are in ``unread_more.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from .base import OWN, VISION, Family, text_config
from .layouts import Layout, Nested, Size
from .shared import GRID, IMAGE_ID, IMAGE_SIZE, PATCH_SIZE, VIDEO_ID

_IDS: dict[str, Any] = {"image_token_index": IMAGE_ID, "tie_word_embeddings": False}
_SQUARE: dict[str, Any] = {**VISION, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}


def aria(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return _IDS | {
        "vision_config": transformers.Idefics3VisionConfig(**_SQUARE),
        "text_config": text_config(text, layers, overrides),
        # patches -> queries; so many patches has what its processor makes at the smaller of two sizes
        "projector_patch_to_query_dict": {GRID**2: GRID**2, 35**2: GRID**2},
    }


def idefics2(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    # so many tokens, whatever the size of a picture
    queries: dict[str, Any] = {"hidden_size": 64, "resampler_n_latents": GRID**2, "resampler_depth": 1}
    queries |= {"resampler_n_heads": 4, "resampler_head_dim": 16, "num_key_value_heads": 2}
    return {
        "vision_config": _SQUARE,
        "perceiver_config": queries,
        "text_config": text_config(text, layers, overrides),
        "image_token_id": IMAGE_ID,
        "tie_word_embeddings": False,
    }


def got(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    side = PATCH_SIZE * GRID * 4  # two convolutions put 16 patches together
    vision = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    # this config has mlp_dim in place of intermediate_size
    vision |= {"image_size": side, "patch_size": PATCH_SIZE, "output_channels": 16, "mlp_dim": 64}
    return _IDS | {
        "vision_config": vision | {"window_size": 7, "global_attn_indexes": [1, 3]},
        "text_config": text_config(text, layers, overrides),
        "image_seq_length": GRID**2,
    }


class Strip(Layout):
    """The patches of all pictures side by side, as one picture that is a patch high."""

    sizes = ((6, 6), (4, 10), (10, 4))  # of tokens

    def block(self, size: Size, alone: bool) -> list[int]:
        return [IMAGE_ID] * math.prod(size)

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        if not sizes:
            return {}
        grids = torch.tensor(sizes) * self.merge  # of patches
        width = int(grids.prod(dim=1).sum()) * PATCH_SIZE
        return {"pixel_values": torch.randn(1, 3, PATCH_SIZE, width, generator=random), "target_sizes": grids}

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        if not count:
            return {}
        widths = (inputs["target_sizes"].prod(dim=1) * PATCH_SIZE).tolist()
        # columns of pixels in the strip
        own = slice(sum(widths[:first]), sum(widths[: first + count]))
        return {
            "pixel_values": inputs["pixel_values"][..., own],
            "target_sizes": inputs["target_sizes"][first : first + count],
        }


def minicpm(mode: str, tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vision_config": {**VISION, "image_size": 4 * IMAGE_SIZE, "patch_size": PATCH_SIZE},
        "text_config": text_config(text, layers, overrides),
        "insert_layer_id": 1,
        "downsample_mode": mode,
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "tie_word_embeddings": False,
    }


def _minicpm(name: str, prefix: str, mode: str, merge: int) -> Family:
    variants = (("own", "qwen3_5_text"),)
    config = partial(minicpm, mode)
    return Family(name, prefix, Strip(merge), variants, config, towers=OWN, hybrid=True, reads_tower=False)


_GOT = Family("got_ocr2", "GotOcr2", Layout(4), (("own", "qwen2"),), got, towers=OWN, reads_tower=False)
_ARIA = Family("aria", "Aria", Layout(), (("own", "aria"),), aria, towers=OWN, reads_tower=False)
FAMILIES = (
    replace(_ARIA, texts=("aria", "llama")),
    Family("idefics2", "Idefics2", Nested(), (("own", "mistral"),), idefics2, towers=OWN, reads_tower=False),
    _GOT,
    # 16x: 4 x 4 patches to a token; 4x: 2 x 2
    _minicpm("minicpmv4_6", "MiniCPMV4_6", "16x", 4),
    _minicpm("minicpm_ocr", "MiniCPMOcr", "4x", 2),
    # the model of GOT-OCR 2 under a config of its own
    replace(_GOT, name="pp_chart2table", config_prefix="PPChart2Table"),
)
