# SPDX-License-Identifier: Apache-2.0
"""Families with M-RoPE in vLLM's wrapper of transformers: tokens that stay keep their row and column."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor
from vllm.model_executor.models.transformers.causal import CausalMixin
from vllm.model_executor.models.transformers.moe import MoEMixin
from vllm.model_executor.models.transformers.multimodal import MultiModalDummyInputsBuilder, MultiModalMixin
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems

from ...errors import UnsupportedError
from ...hooks.vision.pictures import Picture
from ..reduce import KeptRows
from ..request import Request
from .context import in_context
from .mrope import MRopePlaces, grid_extent, grid_places, with_places
from .wrapped import PrunedWrapper, WrappedInfo, WrappedProcessor, layout_of


class PlacedProcessor(WrappedProcessor):
    """Refuses rows that come without the size of their picture."""

    def _request(self, inputs: Any) -> Request:
        for modality, items in inputs.mm_data_items.items():
            if isinstance(items, EmbeddingItems | DictEmbeddingItems):
                raise UnsupportedError(
                    f"a request gave {modality} embeddings, whose places in the picture are not known here; "
                    "send pixels"
                )
        return super()._request(inputs)


class PlacedWrapper(MRopePlaces, PrunedWrapper):
    """Mixed in before vLLM's wrappers: rows bring their places, see mrope.py."""

    placed_by_slot: ClassVar[bool] = True

    def spans(self, feature: Any, input_tokens: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        layout = layout_of(self.config)
        ((grid,),) = layout.made(self.config, feature.data[layout.field].data)
        at = feature.mm_position
        # marks stand around the placeholders
        inside = range(at.length) if at.is_embed is None else at.is_embed.nonzero().flatten().tolist()
        yield at.offset + inside[0], len(inside), grid_extent(1, *grid)

    def _rows(self, request: Request, picture: Picture, kept: KeptRows) -> Tensor:
        (grid,) = picture.grids
        places = grid_places(1, *grid).to(kept.slots.device)
        return with_places(kept.rows, places[kept.slots])


@MULTIMODAL_REGISTRY.register_processor(
    PlacedProcessor, info=in_context(WrappedInfo), dummy_inputs=MultiModalDummyInputsBuilder
)
class PlacedMultiModalForCausalLM(PlacedWrapper, MultiModalMixin, CausalMixin):
    """A model of transformers with M-RoPE."""


@MULTIMODAL_REGISTRY.register_processor(
    PlacedProcessor, info=in_context(WrappedInfo), dummy_inputs=MultiModalDummyInputsBuilder
)
class PlacedMultiModalMoEForCausalLM(PlacedWrapper, MoEMixin, MultiModalMixin, CausalMixin):
    """The same with experts."""
