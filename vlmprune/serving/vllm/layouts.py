# SPDX-License-Identifier: Apache-2.0
"""Families in vLLM's wrapper of transformers: what is known of the tokens of a picture before it is encoded.

Imports no vLLM. Processors and configs are those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import isqrt
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...hooks.vision.pictures import Grids

Size = tuple[int, int]  # (height, width) in pixels


def tokens_of(grids: Grids) -> int:
    """Visual tokens of a picture."""
    return sum(rows * cols for rows, cols in grids)


class TokenLayout(Protocol):
    """How a family makes tokens of a picture."""

    @property
    def field(self) -> str:
        """Of what its processor returns, the field that says it; one entry per item."""

    @property
    def axis(self) -> int:
        """Of the pixels, along which tiles or pictures follow each other."""

    @property
    def alone(self) -> tuple[str, ...]:
        """Further fields with one entry per item, which vLLM would share out by rows of pixels."""

    @property
    def reads(self) -> bool:
        """Whether anything of its tower can be read."""

    @property
    def placed(self) -> bool:
        """Whether its tokens have rows and columns. If not, they are told as one row, to be counted."""

    @property
    def breaks(self) -> str | None:
        """Attribute of its processor: the token between the rows of a picture; None where there is none."""

    def before(self, config: Any, processor: Any, size: Size, options: Mapping[str, Any]) -> Sequence[Grids]:
        """Blocks of every picture of an item, from its size."""

    def made(self, config: Any, value: Tensor) -> Sequence[Grids]:
        """The same from the field of the item."""

    def merges(self, config: Any) -> int:
        """Patches of the tower behind every visual token."""

    def newlines(self, grids: Grids) -> int:
        """Rows of a picture that always stay and are not counted, each with a placeholder."""

    def pixels(self, values: Tensor, some: slice) -> slice:
        """Rows of pixels of some tiles or pictures, whose fields are ``values``."""


@dataclass(frozen=True)
class SquareTiles:
    """Square tiles with equally many tokens; each is a picture with a budget of its own.

    Args:
        side: visual tokens along a side of a tile, from the config.
        count: (processor, size, options) to the number of tiles, where the processor does not say it itself.
        single: a token is a patch of the tower, whose size the config does not tell.
    """

    side: Callable[[Any], int]
    count: Callable[[Any, Size, Mapping[str, Any]], int] | None = None
    axis: int = 0
    reads: bool = True
    single: bool = False
    field = "num_image_patches"
    alone = ()
    placed = True
    breaks = None

    def before(self, config: Any, processor: Any, size: Size, options: Mapping[str, Any]) -> Sequence[Grids]:
        if self.count is not None:
            return self._tiles(config, self.count(processor, size, options))
        found = processor._get_num_multimodal_tokens(image_sizes=[list(size)], **options)
        return self._tiles(config, found["num_image_patches"][0])

    def made(self, config: Any, value: Tensor) -> Sequence[Grids]:
        return self._tiles(config, int(value))

    def merges(self, config: Any) -> int:
        return 1 if self.single else (_patches(config) // self.side(config)) ** 2

    def newlines(self, grids: Grids) -> int:
        return 0

    def pixels(self, values: Tensor, some: slice) -> slice:
        return some

    def _tiles(self, config: Any, count: int) -> Sequence[Grids]:
        side = self.side(config)
        return [((side, side),)] * count


class Queries(SquareTiles):
    """Tiles whose tokens answer learned queries, as many as ``side`` says; nothing is read of the tower."""

    reads = placed = False

    def merges(self, config: Any) -> int:
        return 1

    def _tiles(self, config: Any, count: int) -> Sequence[Grids]:
        return [((1, self.side(config)),)] * count


@dataclass(frozen=True)
class AnySize:
    """Pictures of any size up to an edge, each of one block.

    Args:
        step: (processor) to the pixels that the sides of a resized picture are multiples of.
    """

    step: Callable[[Any], int]
    breaks: str | None = None
    field = "image_sizes"
    alone = ()
    axis = 0
    reads = True
    placed = True

    def before(self, config: Any, processor: Any, size: Size, options: Mapping[str, Any]) -> Sequence[Grids]:
        from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

        edge = (options.get("size") or processor.image_processor.size)["longest_edge"]
        # of this size without its pixels
        blank = np.broadcast_to(np.zeros(1, np.uint8), (*size, 3))
        made = get_resize_output_image_size(blank, (edge, edge), (self.step(processor),) * 2)
        return [self._grid(config, made)]

    def made(self, config: Any, value: Tensor) -> Sequence[Grids]:
        height, width = value.flatten().tolist()
        return [self._grid(config, (height, width))]

    def merges(self, config: Any) -> int:
        return config.spatial_merge_size**2

    def newlines(self, grids: Grids) -> int:
        return 0

    def pixels(self, values: Tensor, some: slice) -> slice:
        return some

    def _grid(self, config: Any, size: Size) -> Grids:
        token = config.vision_config.patch_size * config.spatial_merge_size  # pixels along its side
        return ((size[0] // token, size[1] // token),)


@dataclass(frozen=True)
class PackedPatches:
    """Pictures of any size, each of one block; patches of all of them follow each other.

    Args:
        merge: patches along a side of a token, from the config.
        resized: (processor, size, options) to the size of a resized picture.
    """

    merge: Callable[[Any], int]
    resized: Callable[[Any, Size, Mapping[str, Any]], Size]
    alone: tuple[str, ...] = ()
    field = "image_grid_thw"
    axis = 0
    reads = True
    placed = True
    breaks = None

    def before(self, config: Any, processor: Any, size: Size, options: Mapping[str, Any]) -> Sequence[Grids]:
        patch = config.vision_config.patch_size
        height, width = self.resized(processor, size, options)
        return [self._grid(config, height // patch, width // patch)]

    def made(self, config: Any, value: Tensor) -> Sequence[Grids]:
        _, rows, cols = value.flatten().tolist()
        return [self._grid(config, rows, cols)]

    def merges(self, config: Any) -> int:
        return self.merge(config) ** 2

    def newlines(self, grids: Grids) -> int:
        return 0

    def pixels(self, values: Tensor, some: slice) -> slice:
        counts = values.prod(-1).tolist()
        first = sum(counts[: some.start])
        return slice(first, first + sum(counts[some]))

    def _grid(self, config: Any, rows: int, cols: int) -> Grids:
        side = self.merge(config)
        return ((rows // side, cols // side),)


def _by_area(processor: Any, size: Size, options: Mapping[str, Any], family: str = "qwen2_vl") -> Size:
    """Of processors like that of Qwen2-VL, by the rule of ``family``."""
    rule = import_module(f"transformers.models.{family}.image_processing_pil_{family}").smart_resize
    images = processor.image_processor
    bounds = {**dict(images.size), **dict(options.get("size") or {})}
    return rule(
        *size,
        factor=images.patch_size * images.merge_size,
        min_pixels=options.get("min_pixels") or bounds["shortest_edge"],
        max_pixels=options.get("max_pixels") or bounds["longest_edge"],
    )


def _by_volume(processor: Any, size: Size, options: Mapping[str, Any]) -> Size:
    """Of processors like that of GLM-4.1V, which count a picture as the frames of a step of a clip."""
    from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize

    images = processor.image_processor
    bounds = {**dict(images.size), **dict(options.get("size") or {})}
    return smart_resize(
        images.temporal_patch_size,
        *size,
        temporal_factor=images.temporal_patch_size,
        factor=images.patch_size * images.merge_size,
        min_pixels=bounds["shortest_edge"],
        max_pixels=bounds["longest_edge"],
    )


@dataclass(frozen=True)
class WithNewlines:
    """An overview, and all tiles as one block without their padding; a newline behind each of its rows."""

    field = "image_sizes"
    # crops of a picture that are filling have a place in it
    alone = ("pixel_values",)
    axis = 0
    reads = True
    placed = True
    breaks = None

    def before(self, config: Any, processor: Any, size: Size, options: Mapping[str, Any]) -> Sequence[Grids]:
        from transformers.models.llava_next.modeling_llava_next import (
            get_anyres_image_grid_shape,
            unpad_image,
        )

        side, crop = _patches(config), config.vision_config.image_size
        down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, crop)
        whole = torch.empty(1, down * side, across * side, device="meta")  # of patches
        rows, cols = unpad_image(whole, size).shape[1:]
        return [((side, side), (rows, cols))]

    def made(self, config: Any, value: Tensor) -> Sequence[Grids]:
        height, width = value.flatten().tolist()
        return self.before(config, None, (height, width), {})

    def newlines(self, grids: Grids) -> int:
        return grids[1][0]

    def merges(self, config: Any) -> int:
        return 1

    def pixels(self, values: Tensor, some: slice) -> slice:
        return some


def _patches(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def _shuffled(config: Any) -> int:
    return _patches(config) // config.downsample_factor


def _scaled(config: Any) -> int:
    return _patches(config) // config.scale_factor


def _strided(config: Any) -> int:
    # a side that does not divide is filled up
    return -(-_patches(config) // config.vision_config.hidden_stride)


def _spatial(config: Any) -> int:
    return config.vision_config.spatial_merge_size


def _of_reference(config: Any) -> int:
    # a tower of timm says by this name how many patches stand along a side; for positions, but as released
    return config.vision_config.model_args["ref_feat_shape"][0] // config.projector_pooling_ratio


def _one(processor: Any, size: Size, options: Mapping[str, Any]) -> int:
    return 1


def _crops(processor: Any, size: Size, options: Mapping[str, Any]) -> int:
    # the defaults of the processor, where it has some, go before the settings of its image processor
    defaults = getattr(processor.valid_processor_kwargs, "_defaults", {}).get("images_kwargs", {})
    return processor.image_processor.get_number_of_image_patches(*size, {**defaults, **options})


def _split(processor: Any, size: Size, options: Mapping[str, Any]) -> int:
    # a picture that is not split is one tile, which the processor counts as none
    return processor.image_processor.get_number_of_image_patches(*size, dict(options))[0] or 1


def _covering(processor: Any, size: Size, options: Mapping[str, Any]) -> int:
    """Of Ovis2: the tiles of a picture, and the whole picture where these are several."""
    from transformers.models.ovis2 import image_processing_pil_ovis2 as ovis2

    images = processor.image_processor

    def said(name: str) -> Any:
        return options.get(name, getattr(images, name))

    if not said("crop_to_patches") or said("max_patches") == 1:
        return 1
    side = dict(said("size"))
    if said("use_covering_area_grid"):
        found = ovis2.get_min_tile_covering_grid(size, side["height"], said("max_patches"))
    else:
        tile = (side["height"], side["width"])
        found = ovis2.get_optimal_tiled_canvas(size, tile, said("min_patches"), said("max_patches"))
    tiles = found[0] * found[1]
    return tiles + (tiles > 1)


def _edge(value: Any) -> int:
    """A side in pixels, from a number or a size."""
    return value if isinstance(value, int) else value["height"]


# model type -> layout
LAYOUTS: dict[str, TokenLayout] = {
    "aria": Queries(lambda config: max(config.projector_patch_to_query_dict.values()), reads=False),
    "aya_vision": SquareTiles(_shuffled),
    "cohere2_vision": SquareTiles(_shuffled),
    "llava_next_video": WithNewlines(),
    "vipllava": SquareTiles(_patches),
    "deepseek_vl": SquareTiles(_patches, _one),
    "janus": SquareTiles(_patches, _one),
    # tiles of all pictures of a prompt stand in one row of a batch
    "idefics3": SquareTiles(_scaled, axis=1),
    "smolvlm": SquareTiles(_scaled, _split, axis=1),
    # two convolutions halve the sides
    "got_ocr2": SquareTiles(lambda config: _patches(config) // 4, _crops, reads=False),
    "ovis2": SquareTiles(_strided, _covering),
    "perception_lm": SquareTiles(_of_reference, axis=1, reads=False, single=True),
    "fast_vlm": SquareTiles(lambda config: isqrt(config.image_seq_length), single=True),
    "lighton_ocr": AnySize(lambda processor: _edge(processor.image_processor.patch_size)),
    "exaone4_5": PackedPatches(_spatial, _by_area),
    "glm46v": PackedPatches(_spatial, _by_volume),
    "glm4v": PackedPatches(_spatial, _by_volume),
    "glm4v_moe": PackedPatches(_spatial, _by_volume),
    "glm_ocr": PackedPatches(_spatial, _by_volume),
    "glmga": PackedPatches(_spatial, _by_volume),
    "paddleocr_vl": PackedPatches(_spatial, partial(_by_area, family="paddleocr_vl")),
    "hyperclovax_vision_v2": PackedPatches(_spatial, _by_area),
    # each says how many patches along a side become a token: one, as released
    "video_llama_3": PackedPatches(lambda config: 1, _by_area, alone=("image_merge_sizes",)),
    "mistral3": AnySize(
        lambda processor: processor.patch_size * processor.spatial_merge_size, "image_break_token_id"
    ),
}
