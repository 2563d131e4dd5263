# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6 in vLLM: a picture and its slices, each with a budget of its own.

Patches are merged in the middle of the tower, of which nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from vllm.model_executor.models import minicpmv4_6 as base
from vllm.model_executor.models.minicpmv import MiniCPMVDummyInputsBuilder
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...hooks.vision.pictures import Picture
from ..names import KEY, VERSION_KEY
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .layouts import tokens_of
from .processor import Grids, PruningProcessor, from_field
from .towers import most_tokens, refuse_compiled, tile_by_tile

_FULL, _HALF = 4, 2  # patches along a side of a token, with and without the merger inside the tower


def grids_of(sizes: Tensor, merged: bool) -> list[Grids]:
    """Of an item and its slices, whose rows and columns of patches are ``sizes`` (n, 2)."""
    side = _FULL if merged else _HALF
    return [((rows // side, cols // side),) for rows, cols in sizes.tolist()]


class SlicedProcessor(PruningProcessor, base.MiniCPMV4_6MultiModalProcessor):
    """The processor of MiniCPM-V 4.6 that promises fewer placeholders for images."""

    counted: ClassVar[dict[str, str]] = {"image": "tgt_sizes"}

    def facts(self) -> TowerFacts:
        return TowerFacts(cls=False, depth=0, loaded=0, layer=-1, tower=False, projector=False)

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        size, images = items.get_image_size(index), self.info.get_image_processor()
        shape, known = (size.height, size.width), (images.scale_resolution, images.patch_size)
        merged = self._resolve_downsample_mode(options) != "4x"
        token = images.patch_size * (_FULL if merged else _HALF)  # pixels along its side
        most = self._resolve_max_slice_nums(options) or images.max_slice_nums
        grid = images.get_sliced_grid(shape, most, images.scale_resolution)
        high, wide = images.find_best_resize(shape, *known, allow_upscale=grid is None)
        whole = ((high // token, wide // token),)
        if grid is None:
            return [whole]
        down, across = grid
        high, wide = images.get_refine_size(shape, grid, *known, allow_upscale=True)
        return [whole] + [((high // down // token, wide // across // token),)] * (down * across)

    def processed(self, items: Any, index: int, out: Any, options: Mapping[str, Any]) -> Sequence[Grids]:
        made = out["image"][index]
        return grids_of(made["tgt_sizes"].data, bool(made["use_vit_merger"].data))

    def process_images(self, mm_data: Mapping[str, Any], mm_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        # the options of a request go to the processor of transformers as they are
        ours = (KEY, VERSION_KEY)
        return super().process_images(
            mm_data, {name: mm_kwargs[name] for name in mm_kwargs if name not in ours}
        )


@MULTIMODAL_REGISTRY.register_processor(
    SlicedProcessor, info=in_context(base.MiniCPMV4_6ProcessingInfo), dummy_inputs=MiniCPMVDummyInputsBuilder
)
class MiniCPMV4_6ForConditionalGeneration(base.MiniCPMV4_6ForConditionalGeneration):
    """MiniCPM-V 4.6: tokens have one position each, and most layers of its decoder keep a running state."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_compiled(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.most = most_tokens(vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        field = kwargs.pop(KEY, None)
        if field is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        names = ("pixel_values", "tgt_sizes", "use_vit_merger")
        given = {name: kwargs[name] for name in names}
        flags = [bool(flag) for flag in given["use_vit_merger"]]
        items = [grids_of(*one) for one in zip(given["tgt_sizes"], flags, strict=True)]
        dense = super().embed_multimodal

        def one_turn(start: int, end: int, request: Request) -> list[Tensor]:
            wholes = dense(**{name: value[start:end] for name, value in given.items()})
            tiles = [
                Picture(rows, grids)
                for whole, item in zip(wholes, items[start:end], strict=True)
                for rows, grids in zip(whole.split([tokens_of(grids) for grids in item]), item, strict=True)
            ]
            turn = tile_by_tile(lambda _, some: tiles[some], [len(item) for item in items[start:end]])
            return turn(0, end - start, request)

        sizes = [sum(map(tokens_of, item)) for item in items]
        return in_turns(from_field(field), sizes, self.most, one_turn)
