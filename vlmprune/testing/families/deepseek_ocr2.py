# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-OCR 2: crops of an image and the whole of it, each as answers of learned queries, and a mark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import MOE
from .base import OWN, VISION, Family, text_fields
from .layouts import Layout, Size
from .shared import GRID, IMAGE_ID, PATCH_SIZE

_PIXELS = 8 * PATCH_SIZE  # along a side of every crop
_LAYERS = {"num_hidden_layers": 2}  # of each of two encoders in a row: with more, rounding shows in logits


class WithCrops(Layout):
    """So many tokens per crop as queries; sizes are (crops beside the whole image, 1)."""

    sizes = ((0, 1), (2, 1), (1, 1))

    def block(self, size: Size, alone: bool) -> list[int]:
        return [IMAGE_ID] * ((size[0] + 1) * GRID**2 + 1)

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        if not sizes:
            return {}
        counts = torch.tensor([crops for crops, _ in sizes])
        pixels = torch.randn(int(counts.sum()) + len(sizes), 3, _PIXELS, _PIXELS, generator=random)
        whole, local = pixels[: len(sizes)], pixels[len(sizes) :]
        return _given(whole, local, counts)

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        if not count:
            return {}
        whole = inputs["pixel_values"][first : first + count]
        if "num_local_patches" not in inputs:
            return {"pixel_values": whole}
        counts = inputs["num_local_patches"]
        before = int(counts[:first].sum())
        own = counts[first : first + count]
        return _given(whole, inputs["pixel_values_local"][before : before + int(own.sum())], own)


def _given(whole: Tensor, local: Tensor, counts: Tensor) -> dict[str, Tensor]:
    if not len(local):  # as the processor leaves them out
        return {"pixel_values": whole}
    return {"pixel_values": whole, "pixel_values_local": local, "num_local_patches": counts}


def config(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    sam: dict[str, Any] = {name: value for name, value in VISION.items() if name != "intermediate_size"}
    sam |= {"image_size": _PIXELS, "patch_size": PATCH_SIZE, "mlp_dim": 64, "output_channels": 16}
    sam |= {"window_size": 7, "global_attn_indexes": [1], "downsample_channels": [16, 32]} | _LAYERS
    # one dense layer, then experts
    own = MOE | {"n_shared_experts": 1, "mlp_layer_types": ["dense"] + ["sparse"] * (layers - 1)}
    return {
        "vision_config": {"sam_config": sam, "encoder_config": VISION | {"num_key_value_heads": 4} | _LAYERS},
        "text_config": text_fields(layers) | own | overrides,
        "image_token_id": IMAGE_ID,
        "tie_word_embeddings": False,
    }


def build(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> Any:
    from ..tiny_configs import model_class, tiny_config  # which import this module

    model = model_class("deepseek_ocr2")(tiny_config("deepseek_ocr2", tower, text, layers, overrides))
    # as few queries as other families have tokens; their number is no part of the config
    model.model.vision_tower.query_768_resolution = nn.Embedding(GRID**2, VISION["hidden_size"])
    return model


FAMILIES = (
    Family(
        "deepseek_ocr2",
        "DeepseekOcr2",
        WithCrops(),
        (("own", "own"),),
        config,
        build=build,
        towers=OWN,
        texts=OWN,
        reads_tower=False,
    ),
)
