# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 in vLLM: pictures of any size, of whose tower nothing is read; sounds stay whole.

Where tokens of a picture see each other both ways, those that stay do so too, as in Gemma 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.models.gemma4.image_processing_gemma4 import get_aspect_ratio_preserving_size
from vllm.model_executor.models import gemma4_mm as base
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...hooks.vision.pictures import Picture
from ..names import KEY
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .layouts import tokens_of
from .processor import Grids, PruningProcessor, from_field
from .towers import cut, most_tokens, refuse_compiled


def grids_of(config: Any, places: Tensor) -> Grids:
    """Rows and columns of tokens of a picture, whose patches have ``places`` (n, 2), -1 where nothing is."""
    cols, rows = (places.amax(dim=0) + 1).tolist()
    side = config.vision_config.pooling_kernel_size
    return ((rows // side, cols // side),)


class PooledPlacesProcessor(PruningProcessor, base.Gemma4MultiModalProcessor):
    """The processor of Gemma 4 that promises fewer placeholders for images."""

    def facts(self) -> TowerFacts:
        return TowerFacts(cls=False, depth=0, loaded=0, layer=-1, tower=False, projector=False)

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        size, images = items.get_image_size(index), self.info.get_hf_processor(**options).image_processor
        asked, _ = base._get_max_soft_tokens(self.info.ctx.get_merged_mm_kwargs(options))
        side = images.pooling_kernel_size
        high, wide = get_aspect_ratio_preserving_size(
            height=size.height,
            width=size.width,
            patch_size=images.patch_size,
            max_patches=(asked or images.max_soft_tokens) * side**2,
            pooling_kernel_size=side,
        )
        token = images.patch_size * side  # pixels along its side
        return [((high // token, wide // token),)]

    def processed(self, items: Any, index: int, out: Any, options: Mapping[str, Any]) -> Sequence[Grids]:
        return [grids_of(self.info.get_hf_config(), out["image"][index]["pixel_position_ids"].data)]


@MULTIMODAL_REGISTRY.register_processor(
    PooledPlacesProcessor,
    info=in_context(base.Gemma4ProcessingInfo),
    dummy_inputs=base.Gemma4DummyInputsBuilder,
)
class Gemma4ForConditionalGeneration(base.Gemma4ForConditionalGeneration):
    """Gemma 4: patches are averaged to tokens by their places."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_compiled(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.most = most_tokens(vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        field = kwargs.pop(KEY, None)
        if field is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        pixels, places = kwargs["pixel_values"], kwargs["pixel_position_ids"]
        grids, dense = [grids_of(self.config, one) for one in places], super().embed_multimodal

        def one_turn(start: int, end: int, request: Request) -> list[Tensor]:
            some = slice(start, end)
            features = dense(pixel_values=pixels[some], pixel_position_ids=places[some])
            pictures = [Picture(*one) for one in zip(features, grids[some], strict=True)]
            return [kept.rows for kept in cut(pictures, request, None)]

        return in_turns(from_field(field), [tokens_of(one) for one in grids], self.most, one_turn)
