# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL and Qwen2.5-VL in vLLM: pictures of any size, tokens with places in them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.method import Need
from ...errors import UnsupportedError
from ...hooks.vision.pictures import Picture
from ..names import DENSE
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .mrope import MRopePlaces, grid_extent, grid_places, with_places
from .processor import Grids, PruningProcessor, field_name, from_field
from .towers import WatchedTower, cut, most_tokens, refuse_compiled


@dataclass(frozen=True)
class Keywords:
    """How vLLM's models of this family name what they are given."""

    name: str
    pixels: str
    embeds: str

    @property
    def grid(self) -> str:
        return f"{self.name}_grid_thw"


KEYWORDS = (
    Keywords("image", "pixel_values", "image_embeds"),
    Keywords("video", "pixel_values_videos", "video_embeds"),
)


BOUNDS = ("min_pixels", "max_pixels")  # of a resized picture


def check_bounds(bounds: Mapping[str, Any], server: Mapping[str, int], clips: bool) -> None:
    """Refuse bounds of a request that would make a picture larger than the server's own.

    Args:
        server: its ``size``, of which the longest edge is the most pixels of a picture.
        clips: the request has some, whose processor reads the same options.
    """
    least, most = server["shortest_edge"], server["longest_edge"]
    low, high = bounds.get("min_pixels", least), bounds.get("max_pixels", most)
    # a bool is an int to Python
    if not (type(low) is type(high) is int and 0 < low <= high <= most):
        raise UnsupportedError(
            f"a request gave {dict(bounds)}; expected whole numbers with 0 < min_pixels <= max_pixels <= "
            f"{most}, the most of this server, where min_pixels is {least} unless given"
        )
    if clips:
        raise UnsupportedError(
            f"a request gave {sorted(bounds)} with a clip, which was not measured; send images, or leave "
            "them out"
        )


class OfQwen(PruningProcessor):
    """What processors of the family say alike."""

    counted: ClassVar[dict[str, str]] = {"image": "image_grid_thw", "video": "video_grid_thw"}

    def facts(self) -> TowerFacts:
        vision = self.info.get_hf_config().vision_config
        full = getattr(vision, "fullatt_block_indexes", None)
        return TowerFacts(
            cls=False,
            depth=vision.depth,
            loaded=vision.depth,
            layer=-1,
            projector=False,
            merges=vision.spatial_merge_size**2,
            full=None if full is None else tuple(full),
        )

    def checked_options(self, inputs: Any) -> Collection[str]:
        bounds = {
            name: inputs.hf_processor_mm_kwargs[name]
            for name in BOUNDS
            if name in inputs.hf_processor_mm_kwargs
        }
        if bounds:
            check_bounds(bounds, self.info.get_image_processor().size, "video" in inputs.mm_data_items)
        return bounds

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        if items.modality == "video":
            return []  # how a clip is sampled and sized is known when it was processed
        size = items.get_image_size(index)
        made, _ = self.info._get_vision_info(
            image_width=size.width,
            image_height=size.height,
            image_processor=self.info.get_image_processor(**options),
            mm_kwargs=options,
        )
        vision = self.info.get_hf_config().vision_config
        token = vision.patch_size * vision.spatial_merge_size  # pixels along its side
        return [((made.height // token, made.width // token),)]

    def processed(self, items: Any, index: int, out: Any, options: Mapping[str, Any]) -> Sequence[Grids]:
        (frames, rows, cols) = out[items.modality][index][f"{items.modality}_grid_thw"].data.tolist()
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        return [((rows // merge, cols // merge),) * frames]


class PrunedQwen(MRopePlaces):
    """Mixed in before the models of the family."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_compiled(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vision = self.config.vision_config
        self.merge: int = vision.spatial_merge_size
        self.width: int = vllm_config.model_config.get_hidden_size()
        self.most = most_tokens(vllm_config)
        self.watched = WatchedTower(self.visual, self.visual.merger, -1, vision.depth)

    def spans(self, feature: Any, input_tokens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        at, grid = feature.mm_position, feature.data[f"{feature.modality}_grid_thw"].data.tolist()
        seconds = feature.data.get("second_per_grid_ts")
        factor = self._factor(None if seconds is None else seconds.data.item())
        # as many placeholders as stay, but the positions of the whole picture
        yield at.offset, at.length, grid_extent(*self._merged(grid), factor)

    def _merged(self, grid: Sequence[int]) -> tuple[int, int, int]:
        """(frames, rows, cols) of tokens, of a grid of patches."""
        return grid[0], grid[1] // self.merge, grid[2] // self.merge

    def _factor(self, seconds: float | None) -> float:
        """Positions between two frames that are so many seconds apart."""
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        return 1.0 if seconds is None else seconds * per_second

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        rows: list[Tensor] = []
        for words in KEYWORDS:
            field = kwargs.pop(field_name(words.name), None)
            if kwargs.get(words.pixels) is not None:
                rows += self._pruned(words, kwargs, field)
            elif kwargs.get(words.embeds) is not None:
                rows += self._reduced(words, kwargs, None)
        return rows

    def _pruned(self, words: Keywords, kwargs: dict[str, Any], field: Any) -> list[Tensor]:
        grids = kwargs[words.grid].tolist()
        specs = [DENSE] * len(grids) if field is None else from_field(field)

        def one_turn(start: int, end: int, request: Request) -> list[Tensor]:
            return self._reduced(words, _items(kwargs, words, start, end), request)

        sizes = [frames * height * width // self.merge**2 for frames, height, width in grids]
        return in_turns(specs, sizes, self.most, one_turn)

    def _reduced(self, words: Keywords, kwargs: dict[str, Any], request: Request | None) -> list[Tensor]:
        """The rows that are left of items, with their places; None: of embeddings, which all stay."""
        grids = kwargs[words.grid].tolist()
        # the tower attends inside a frame: each is a sequence of its own
        lengths = [height * width for frames, height, width in grids for _ in range(frames)]
        needs = () if request is None else request.needs
        whole, found = self.watched.run(needs, lambda: self._encoded(words, kwargs), lengths)
        seconds = kwargs.get("second_per_grid_ts")
        # seconds between frames; images have none
        apart: list[float | None] = [None] * len(grids) if seconds is None else list(map(float, seconds))
        places = [self._places(grid, one) for grid, one in zip(grids, apart, strict=True)]
        if request is None:
            return [with_places(one, at.to(one.device)) for one, at in zip(whole, places, strict=True)]
        captured = self._divided(found, grids)
        pictures = [
            Picture(
                one[:, : self.width],  # behind it stand the features of DeepStack, which follow the choice
                (self._merged(grid)[1:],) * grid[0],
                {need: parts[number] for need, parts in captured.items()},
                frames=words.name == "video",
            )
            for number, (one, grid) in enumerate(zip(whole, grids, strict=True))
        ]
        kept = cut(pictures, request, None, in_place=True)
        return [
            with_places(
                # a merged row takes DeepStack's features of the token in whose place it stands
                torch.cat([left.rows.to(one), one[left.slots, self.width :]], dim=1),
                at.to(one.device)[left.slots],
            )
            for one, left, at in zip(whole, kept, places, strict=True)
        ]

    def _encoded(self, words: Keywords, kwargs: dict[str, Any]) -> Sequence[Tensor]:
        if words.name == "image":
            return self._process_image_input(self._parse_and_validate_image_input(**kwargs))
        return self._process_video_input(self._parse_and_validate_video_input(**kwargs))

    def _places(self, grid: list[int], seconds: float | None) -> Tensor:
        """(N, 3) what every token of an item adds to the position of its picture."""
        return grid_places(*self._merged(grid), self._factor(seconds))

    def _divided(
        self, found: Mapping[Need, Tensor], grids: Sequence[Sequence[int]]
    ) -> dict[Need, list[Tensor]]:
        """What was captured, by item: (N, channels), of encoder patches (N * merge**2, channels)."""
        divided = {}
        for need, value in found.items():
            packed = value.flatten(0, -2).split([frames * height * width for frames, height, width in grids])
            ordered = [self._in_order(one, grid) for one, grid in zip(packed, grids, strict=True)]
            if need.what != "encoder_features":
                # mean of the patches that make up a token
                ordered = [one.unflatten(0, (-1, self.merge**2)).mean(dim=1) for one in ordered]
            divided[need] = ordered
        return divided

    def _in_order(self, patches: Tensor, grid: Sequence[int]) -> Tensor:
        """(n, channels) of an item in the order of its pixels, where the tower works in another."""
        return patches


def _items(kwargs: dict[str, Any], words: Keywords, start: int, end: int) -> dict[str, Any]:
    """The arguments of some items; pixels of all items follow each other."""
    sizes = kwargs[words.grid].prod(-1).tolist()
    first = sum(sizes[:start])
    # every field has one entry per item, except the pixels
    some = {name: value[start:end] for name, value in kwargs.items() if value is not None}
    some[words.pixels] = kwargs[words.pixels][first : first + sum(sizes[start:end])]
    return some


class PrunedWindows(PrunedQwen):
    """Mixed in before models whose tower works window by window."""

    def _in_order(self, patches: Tensor, grid: Sequence[int]) -> Tensor:
        # tokens in the order of windows; argsort gives the way back
        windows = self.visual.get_window_index_thw(*grid)[0].to(patches.device)
        return patches.unflatten(0, (-1, self.merge**2))[windows.argsort()].flatten(0, 1)


class Qwen2VLProcessor(OfQwen, qwen2_vl.Qwen2VLMultiModalProcessor):
    """The processor of Qwen2-VL that promises fewer placeholders for images and clips."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2VLProcessor,
    info=in_context(qwen2_vl.Qwen2VLProcessingInfo),
    dummy_inputs=qwen2_vl.Qwen2VLDummyInputsBuilder,
)
class Qwen2VLForConditionalGeneration(PrunedQwen, qwen2_vl.Qwen2VLForConditionalGeneration):
    """Qwen2-VL: the tower attends to the whole picture."""


class Qwen25VLProcessor(OfQwen, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """The processor of Qwen2.5-VL that promises fewer placeholders for images and clips."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor,
    info=in_context(qwen2_5_vl.Qwen2_5_VLProcessingInfo),
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen2_5_VLForConditionalGeneration(PrunedWindows, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""
