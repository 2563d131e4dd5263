# SPDX-License-Identifier: Apache-2.0
"""Families that read packed pictures with a projector beside the tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from ..backbones import MOE
from .base import OWN, VISION, Family, text_config
from .layouts import Packed, Size
from .qwen2_5_vl import WINDOWS
from .qwen2_vl import OUT, qwen
from .qwen3_vl import STACKED
from .qwen3_vl import config as qwen3_vl
from .shared import BOS_ID, EOS_ID, IMAGE_ID, IMAGE_SIZE, MERGE, PATCH_SIZE, VIDEO_ID

_IDS: dict[str, Any] = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "tie_word_embeddings": False}
_FLAT, _SQUARE = (3 * PATCH_SIZE**2,), (3, PATCH_SIZE, PATCH_SIZE)  # pixels of a patch
_SIDE = 2 * IMAGE_SIZE // PATCH_SIZE  # patches along a side of a square picture
_SOUNDS: dict[str, Any] = {  # a tower for sounds, which no test gives
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "d_model": 16,
    "output_dim": 64,
    "downsample_hidden_size": 8,
}
# a picture is looked for by the first mark, which must not stand at the beginning of a text
_MARKS = ((EOS_ID,), (BOS_ID,))
_OMNI: dict[str, Any] = {"vision_start_token_id": EOS_ID, "vision_end_token_id": BOS_ID}
_OMNI["audio_config"] = _SOUNDS


def omni(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    made = qwen(OUT | WINDOWS, layers, overrides)
    # this config has other names for both ids
    made |= {"image_token_index": made.pop("image_token_id"), "video_token_index": made.pop("video_token_id")}
    return made | _OMNI


def omni_moe(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    own = MOE | {"head_dim": 16}
    return qwen(OUT | STACKED, layers, overrides, own, {"mrope_interleaved": True}) | _OMNI


def compass(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    made = qwen(OUT | STACKED, layers, overrides)
    decoder = made["text_config"]
    decoder["rope_parameters"] = {"full_attention": decoder["rope_parameters"]}
    return made


def exaone(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    made = qwen(OUT | WINDOWS | {"num_key_value_heads": 2}, layers, overrides)
    return _IDS | {
        "vision_config": made["vision_config"],
        "text_config": text_config(text, layers, overrides),
    }


def hyperclovax(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    # 48 is not the width of the language model: a projector stands between them
    made = qwen(OUT | WINDOWS | {"out_hidden_size": 48}, layers, overrides)
    vision = transformers.AutoConfig.for_model("qwen2_5_vl_vision", **made["vision_config"])
    return _IDS | {"vision_config": vision, "text_config": text_config(text, layers, overrides)}


def lfm3(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    kinds = ["conv", "full_attention", "full_attention", "conv"]
    vision = {**VISION, "num_key_value_heads": 2, "layer_types": kinds}
    vision |= {"patch_size": PATCH_SIZE, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
    return _IDS | {
        "vision_config": vision,
        "text_config": text_config(text, layers, overrides),
        "projector_hidden_size": 96,
    }


def edge(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    made = qwen({}, layers, overrides, {"head_dim": 16}, {"mrope_interleaved": True})
    vision = {**VISION, "patch_size": PATCH_SIZE, "spatial_merge_size": MERGE, "num_patches": _SIDE**2}
    return made | {"vision_config": vision, "projector_hidden_size": 96}


def paddle(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    made = qwen({}, layers, overrides, {"head_dim": 16})
    vision = {**VISION, "patch_size": PATCH_SIZE, "spatial_merge_size": MERGE, "image_size": 2 * IMAGE_SIZE}
    return made | {"vision_config": vision, "tie_word_embeddings": False}


def ernie(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    experts = {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": [32, 16],  # of experts for text, and for pictures
        "moe_num_shared_experts": 1,
    }
    own = {"hidden_size": 32, "intermediate_size": 64}
    # rows and columns take turns in front of the time
    made = qwen(own, layers, overrides, experts, {"mrope_section": [3, 3, 2]})
    return made | {"tie_word_embeddings": False}


def kimi(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    vision = {**VISION, "patch_size": PATCH_SIZE, "pos_emb_height": _SIDE, "pos_emb_width": _SIDE}
    return _IDS | {
        "vision_config": vision,
        "text_config": text_config(text, layers, overrides),
        "projection_hidden_size": VISION["hidden_size"],
    }


class OfSides(Packed):
    """Every picture says how many patches along each side become a token: one of images, two of clips."""

    sizes = ((84, 84), (56, 140), (140, 56))

    def __init__(self) -> None:
        super().__init__(patch=_FLAT, typed=False)
        # a patch of an image is a token; those of clips are merged, which ``videos`` says
        self.merge, self.pixels = 1, IMAGE_SIZE

    def block(self, size: Size, alone: bool) -> list[int]:
        return [BOS_ID] + [IMAGE_ID] * math.prod(self.grid(size))

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        found = super().images(sizes, images, random)
        return found | ({"image_merge_sizes": torch.ones(len(sizes), dtype=torch.long)} if sizes else {})

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        found = super().row(inputs, first, count)
        own = {"image_merge_sizes": inputs["image_merge_sizes"][first : first + count]} if count else {}
        return found | own

    def videos(self, rows: int, frames: int, random: torch.Generator) -> dict[str, Tensor]:
        found = super().videos(rows, frames, random)
        return found | {"video_merge_sizes": torch.full((rows,), MERGE)}

    def video_row(self, inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        return super().video_row(inputs, i) | {"video_merge_sizes": inputs["video_merge_sizes"][i : i + 1]}


def video_llama(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    return _IDS | {
        "vision_config": {**VISION, "patch_size": PATCH_SIZE},
        "text_config": text_config(text, layers, overrides),
    }


class Timed(Packed):
    """Qwen's thinkers: how many seconds the steps of each clip take, by which its frames have positions."""

    def __init__(self) -> None:
        super().__init__(typed=False, marks=_MARKS)

    def videos(self, rows: int, frames: int, random: torch.Generator) -> dict[str, Tensor]:
        return super().videos(rows, frames, random) | {"video_second_per_grid": torch.ones(rows)}

    def video_row(self, inputs: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        return super().video_row(inputs, i) | {
            "video_second_per_grid": inputs["video_second_per_grid"][i : i + 1]
        }


def _own(name: str, prefix: str, layout: Packed, config: Any) -> Family:
    return Family(name, prefix, layout, (("own", "own"),), config, towers=OWN, texts=OWN)


FAMILIES = (
    _own("qwen2_5_omni_thinker", "Qwen2_5OmniThinker", Timed(), omni),
    _own("qwen3_omni_moe_thinker", "Qwen3OmniMoeThinker", Timed(), omni_moe),
    _own("cosmos3_omni", "Cosmos3Omni", Packed(True), qwen3_vl),
    _own("cohere_compass", "CohereCompass", Packed(True), compass),
    Family("exaone4_5", "Exaone4_5_", Packed(typed=False), (("own", "exaone4"),), exaone, towers=OWN),
    Family(
        "hyperclovax_vision_v2",
        "HyperCLOVAXVisionV2",
        Packed(typed=False),
        (("own", "hyperclovax"),),
        hyperclovax,
        towers=OWN,
        texts=("hyperclovax", "llama"),
    ),
    Family(
        "lfm3_vl",
        "Lfm3Vl",
        Packed(typed=False),
        (("own", "lfm3"),),
        lfm3,
        towers=OWN,
        texts=("lfm3", "lfm2"),
        hybrid=True,
    ),
    _own("cosmos3_edge", "Cosmos3Edge", Packed(True, patch=_FLAT), edge),
    _own("paddleocr_vl", "PaddleOCRVL", Packed(patch=_SQUARE, clips=False), paddle),
    _own("ernie4_5_vl_moe", "Ernie4_5_VLMoe", Packed(patch=_FLAT, clips=False), ernie),
    Family("video_llama_3", "VideoLlama3", OfSides(), (("own", "qwen2"),), video_llama, towers=OWN),
    Family(
        "kimi_k25",
        "Kimi_K25",
        Packed(patch=_SQUARE, clips=False, typed=False),
        (("own", "deepseek_v3"),),
        kimi,
        towers=OWN,
    ),
)
