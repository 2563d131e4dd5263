# SPDX-License-Identifier: Apache-2.0
"""Perception LM, Gemma 3n, Molmo 2: more families of whose tower nothing is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from .base import OWN, VISION, Family, text_config, text_fields, vision_config
from .layouts import Layout, Size
from .shared import EOS_ID, GRID, IMAGE_ID, IMAGE_SIZE, MERGE, PATCH_SIZE, VIDEO_ID

_KINDS = ["sliding_attention", "full_attention"]


class InTiles(Layout):
    """Every picture is one tile, in an axis of tiles."""

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        return {name: value[:, None] for name, value in super().images(sizes, images, random).items()}


class Pooled(Layout):
    """Molmo 2: patches of a picture and of its crop, a table of those behind each token, and grids of tokens.

    Sizes are those of the crop in pixels, 0 for none. A mark ends every row of tokens.
    """

    sizes = ((0, 0), (112, 168), (168, 84))

    def __init__(self) -> None:
        super().__init__(MERGE)

    def crop(self, size: Size) -> tuple[int, int]:
        """Rows and columns of the tokens of a crop, which is no larger than the whole."""
        rows, cols = (min(side // (PATCH_SIZE * self.merge), GRID) for side in size)
        return rows, cols

    def block(self, size: Size, alone: bool) -> list[int]:
        rows, cols = self.crop(size)
        # rows of the whole picture, then those of its crop
        widths = [GRID] * GRID + [cols] * rows
        return [i for width in widths for i in [*[IMAGE_ID] * width, EOS_ID]]

    def table(self, rows: int, cols: int, first: int) -> Tensor:
        """(rows * cols, 4) patches behind each token of one crop, whose patches count from ``first``."""
        side = GRID * self.merge
        patch = torch.arange(side**2).view(side, side)[: rows * self.merge, : cols * self.merge]
        # (rows, merge, cols, merge)
        cells = patch.unflatten(0, (rows, self.merge)).unflatten(2, (cols, self.merge))
        return cells.transpose(1, 2).reshape(rows * cols, self.merge**2) + first

    def images(
        self, sizes: Sequence[Size], images: Sequence[int], random: torch.Generator
    ) -> dict[str, Tensor]:
        if not sizes:
            return {}
        tables: list[Tensor] = []
        counts: list[int] = []
        crops = 0
        for rows, cols in map(self.crop, sizes):
            # the whole, and its crop where there is one
            counts.append(1 + (rows > 0))
            tables.append(self.table(GRID, GRID, crops * self.patches))
            # empty without a crop
            tables.append(self.table(rows, cols, (crops + 1) * self.patches))
            crops += counts[-1]
        return {
            "pixel_values": torch.randn(crops, self.patches, 3 * PATCH_SIZE**2, generator=random),
            "image_token_pooling": torch.cat(tables),
            "image_grids": torch.tensor([(GRID, GRID, *self.crop(size)) for size in sizes]),
            "image_num_crops": torch.tensor(counts),
        }

    def row(self, inputs: dict[str, Tensor], first: int, count: int) -> dict[str, Tensor]:
        if not count:
            return {}
        grids, counts = inputs["image_grids"], inputs["image_num_crops"]
        tokens = (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).tolist()
        before, crops = int(counts[:first].sum()), int(counts[first : first + count].sum())
        own = slice(sum(tokens[:first]), sum(tokens[: first + count]))
        return {
            "pixel_values": inputs["pixel_values"][before : before + crops],
            # patches count from the first crop of the row
            "image_token_pooling": inputs["image_token_pooling"][own] - before * self.patches,
            "image_grids": grids[first : first + count],
            "image_num_crops": counts[first : first + count],
        }

    def beside(self, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": ((ids == IMAGE_ID) | (ids == EOS_ID)).int()}


def perception(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    shape = {"embed_dim": VISION["hidden_size"], "ref_feat_shape": [GRID, GRID]}
    if tower == "timm":  # as released, which needs timm
        shape |= {"depth": VISION["num_hidden_layers"], "num_heads": VISION["num_attention_heads"]}
        shape |= {"img_size": [IMAGE_SIZE, IMAGE_SIZE], "global_pool": "", "init_values": 0.1}
        shape |= {"use_post_transformer_norm": False}
        vision: Any = transformers.TimmWrapperConfig(
            architecture="vit_pe_core_large_patch14_336", model_args=shape
        )
    else:
        vision = vision_config("clip")  # in its place, since nothing is read of it
        vision.model_args = shape
    return {
        "vision_config": vision,
        "text_config": text_config(text, layers, overrides),
        "image_token_id": IMAGE_ID,
        "video_token_id": VIDEO_ID,
        "tie_word_embeddings": False,
    }


def gemma3n(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {"head_dim": 16, "sliding_window": 64, "num_kv_shared_layers": 2, "laurel_rank": 8}
    own |= {"layer_types": [_KINDS[layer % 2] for layer in range(layers)], "altup_num_inputs": 2}
    own |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": IMAGE_ID}
    own["final_logit_softcapping"] = 1e6  # as good as none
    sounds: dict[str, Any] = {"hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1}
    sounds |= {"input_feat_size": 16, "sscp_conv_channel_size": (4, 4)}
    words = text_fields(layers)["vocab_size"]  # ids behind them would be of the tables of pictures and sounds
    return {
        "text_config": text_fields(layers) | own | overrides,
        "vision_config": {
            # as in the released tower, its last step has no ReLU, whose output the model would scale in place
            "architecture": "test_convnext2",
            "hidden_size": 128,
            "vocab_offset": words,
            "vocab_size": 1,
        },
        "audio_config": sounds | {"vocab_offset": words + 1, "vocab_size": 1},
        "vision_soft_tokens_per_image": GRID**2,
        "image_token_id": IMAGE_ID,
        "tie_word_embeddings": False,
    }


def molmo(tower: str, text: str, layers: int, overrides: dict[str, Any]) -> dict[str, Any]:
    vision: dict[str, Any] = {**VISION, "num_key_value_heads": 4, "head_dim": 8, "patch_size": PATCH_SIZE}
    vision["image_size"] = [IMAGE_SIZE * MERGE] * 2
    pools: dict[str, Any] = {
        "vision_feature_layer": [3, 1],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    pools |= {"num_key_value_heads": 4, "intermediate_size": 64, "text_hidden_size": 64}
    fields = text_fields(layers) | {"head_dim": 16, "additional_vocab_size": 0} | overrides
    return {
        "vision_config": vision,
        "adapter_config": pools,
        "text_config": fields,
        "image_patch_id": IMAGE_ID,
        "tie_word_embeddings": False,
    }


def _own(name: str, prefix: str, layout: Layout, config: Any) -> Family:
    return Family(name, prefix, layout, (("own", "own"),), config, towers=OWN, texts=OWN, reads_tower=False)


FAMILIES = (
    Family(
        "perception_lm",
        "PerceptionLM",
        InTiles(),
        (("own", "llama"),),
        perception,
        towers=(*OWN, "timm"),
        reads_tower=False,
    ),
    _own("gemma3n", "Gemma3n", Layout(patch_size=32), gemma3n),  # 32 pixels to a token
    _own("molmo2", "Molmo2", Pooled(), molmo),
)
