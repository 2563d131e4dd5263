# SPDX-License-Identifier: Apache-2.0
"""Gemma 3n in vLLM: square pictures, of whose tower of convolutions nothing is read; sounds stay whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from torch import Tensor
from vllm.model_executor.models import gemma3n_mm as base
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...hooks.vision.pictures import Picture
from ..names import KEY
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .processor import Grids, PruningProcessor, from_field
from .towers import cut, most_tokens, refuse_compiled


def grids_of(config: Any) -> Grids:
    """Rows and columns of the tokens of a picture."""
    side = isqrt(config.vision_soft_tokens_per_image)
    return ((side, side),)


class SoftTokensProcessor(PruningProcessor, base.Gemma3nMultiModalProcessor):
    """The processor of Gemma 3n that promises fewer placeholders for images."""

    def facts(self) -> TowerFacts:
        return TowerFacts(cls=False, depth=0, loaded=0, layer=-1, tower=False, projector=False)

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        return [grids_of(self.info.get_hf_config())]


@MULTIMODAL_REGISTRY.register_processor(
    SoftTokensProcessor,
    info=in_context(base.Gemma3nProcessingInfo),
    dummy_inputs=base.Gemma3nDummyInputsBuilder,
)
class Gemma3nForConditionalGeneration(base.Gemma3nForConditionalGeneration):
    """Gemma 3n: what layers read of a token beside its embedding is alike for all tokens of pictures."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_compiled(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.most, self.grids = most_tokens(vllm_config), grids_of(self.config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        field = kwargs.pop(KEY, None)
        pixels = kwargs.get("pixel_values")
        if field is None or pixels is None:
            return super().embed_multimodal(**kwargs)
        dense = super().embed_multimodal

        def one_turn(start: int, end: int, request: Request) -> list[Tensor]:
            pictures = [Picture(one, self.grids) for one in dense(pixel_values=pixels[start:end])]
            return [kept.rows for kept in cut(pictures, request, None)]

        specs = from_field(field)
        return in_turns(specs, [self.config.vision_soft_tokens_per_image] * len(specs), self.most, one_turn)
