# SPDX-License-Identifier: Apache-2.0
"""Granite 4 Vision in vLLM: tiles as in LLaVA-NeXT, and features that several layers of the decoder add."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models import granite4_vision as base
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...errors import UnsupportedError
from ...hooks.vision.pictures import Picture
from ...models.base import tile_grids
from ..names import KEY
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .llava import side_of
from .llava_next import OfTiles
from .processor import from_field
from .towers import cut, most_tokens, refuse_compiled


def tokens_of_side(config: Any) -> int:
    """Visual tokens along a side of a crop."""
    return int(side_of(config) * Fraction(config.downsample_rate))


class LayeredTilesProcessor(OfTiles, base.Granite4VisionMultiModalProcessor):
    """The processor of Granite 4 Vision that promises fewer placeholders."""

    def facts(self) -> TowerFacts:
        return TowerFacts(cls=False, depth=0, loaded=0, layer=-1, tower=False, projector=False)

    def _request(self, inputs: Any) -> Request:
        request = super()._request(inputs)
        if request.budget is not None and request.method.kind() == "merge":
            raise UnsupportedError(
                f"{request.text!r} puts rows of its own in place of tokens, and layers of this model add "
                "features to tokens, which such rows have none of; use 'divprune@64'"
            )
        return request

    @property
    def side(self) -> int:
        return tokens_of_side(self.info.ctx.model_config.hf_config)


@MULTIMODAL_REGISTRY.register_processor(
    LayeredTilesProcessor,
    info=in_context(base.Granite4VisionProcessingInfo),
    dummy_inputs=base.LlavaDummyInputsBuilder,
)
class Granite4VisionForConditionalGeneration(base.Granite4VisionForConditionalGeneration):
    """Methods see the features of the first layer that adds some; those of the others follow the choice."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_compiled(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.most, self.side = most_tokens(vllm_config), tokens_of_side(self.config)
        width, layers = self.config.text_config.hidden_size, self._ds_layer_indices
        # of two for one layer the later one counts
        level = max(number for number, layer in enumerate(layers) if layer == min(layers))
        self.first = slice(level * width, (level + 1) * width)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        field = kwargs.pop(KEY, None)
        if field is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        dense = super().embed_multimodal

        def one_turn(start: int, end: int, request: Request) -> list[Tensor]:
            some = {name: value[start:end] for name, value in kwargs.items() if value is not None}
            # (length, D * levels) of every picture
            return self._reduced(dense(**some), some["image_sizes"], request)

        specs, side = from_field(field), self.config.vision_config.image_size
        # the overview, and the tiles of the largest canvas
        crops = 1 + max((high // side) * (wide // side) for high, wide in self.config.image_grid_pinpoints)
        return in_turns(specs, [self.side**2 * crops] * len(specs), self.most, one_turn)

    def _reduced(self, wholes: list[Tensor], sizes: Tensor, request: Request) -> list[Tensor]:
        marks = [self._newlines(size) for size in sizes]
        pictures = [
            Picture(one[:, self.first], tile_grids(special, self.side), {}, special)
            for one, special in zip(wholes, marks, strict=True)
        ]
        # methods that merge are refused, so that every row is that of a token
        kept = cut(pictures, request, None)
        return [one[left.slots] for one, left in zip(wholes, kept, strict=True)]

    def _newlines(self, size: Tensor) -> Tensor:
        """(length,) bool on the CPU, by vLLM's own packing of zeros with NaN for newlines."""
        high, wide = get_anyres_image_grid_shape(
            size.tolist(), self.config.image_grid_pinpoints, self.config.vision_config.image_size
        )
        stand_in = SimpleNamespace(
            config=self.config,
            image_newline=torch.full((1,), torch.nan),
            _downsample_rate=self._downsample_rate,
        )
        crops = torch.zeros(1 + high * wide, self.side**2, 1)
        (packed,) = super()._pack_and_unpad_image_features.__func__(stand_in, [crops], size[None])
        return packed[:, 0].isnan()
