# SPDX-License-Identifier: Apache-2.0
"""Gemma 3 in vLLM: square pictures, and with pan and scan their crops, each with a budget of its own.

Tokens of a picture see each other both ways: vLLM tells its attention which tokens are one by their
placeholders, so that those that stay do so too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from vllm.model_executor.models import gemma3_mm as base
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.method import Need
from ...hooks.vision.capture import OF_PROJECTOR
from ...hooks.vision.pictures import Picture
from ...models.merging import averaged
from ..names import KEY
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .llava import side_of
from .processor import Grids, PruningProcessor, from_field
from .towers import WatchedTower, most_tokens, refuse_compiled, tile_by_tile


def tokens_of_side(config: Any) -> int:
    """Visual tokens along a side of a crop."""
    return int(config.mm_tokens_per_image**0.5)


class PannedProcessor(PruningProcessor, base.Gemma3MultiModalProcessor):
    """The processor of Gemma 3 that promises fewer placeholders."""

    counted: ClassVar[dict[str, str]] = {"image": "num_patches"}  # says how many crops an item has

    def facts(self) -> TowerFacts:
        config = self.info.get_hf_config()
        depth, merge = config.vision_config.num_hidden_layers, side_of(config) // tokens_of_side(config)
        return TowerFacts(cls=False, depth=depth, loaded=depth, layer=-1, projector=False, merges=merge**2)

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        size = items.get_image_size(index)
        crops = self.info.get_num_crops(
            image_width=size.width,
            image_height=size.height,
            processor=self.info.get_hf_processor(**options),
            mm_kwargs=options,
        )
        return self._crops(1 + crops)

    def processed(self, items: Any, index: int, out: Any, options: Mapping[str, Any]) -> Sequence[Grids]:
        return self._crops(int(out["image"][index]["num_patches"].data))

    def _crops(self, count: int) -> Sequence[Grids]:
        side = tokens_of_side(self.info.get_hf_config())
        return [((side, side),)] * count


@MULTIMODAL_REGISTRY.register_processor(
    PannedProcessor,
    info=in_context(base.Gemma3ProcessingInfo),
    dummy_inputs=base.Gemma3DummyInputsBuilder,
)
class Gemma3ForConditionalGeneration(base.Gemma3ForConditionalGeneration):
    """Gemma 3: patches are averaged to tokens."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_compiled(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.most, self.side = most_tokens(vllm_config), tokens_of_side(self.config)
        # what is given averaged patches
        first, depth = (
            self.multi_modal_projector.mm_soft_emb_norm,
            self.config.vision_config.num_hidden_layers,
        )
        self.watched = WatchedTower(self.vision_tower, first, -1, depth)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        field = kwargs.pop(KEY, None)
        pixels = kwargs.get("pixel_values")
        if field is None or pixels is None:
            return super().embed_multimodal(**kwargs)
        crops = kwargs["num_patches"].tolist()
        one_turn = tile_by_tile(lambda request, some: self._encode(request, pixels[some]), crops)
        return in_turns(from_field(field), [self.side**2 * count for count in crops], self.most, one_turn)

    def _encode(self, request: Request, pixels: Tensor) -> list[Picture]:
        features, found = self.watched.run(
            request.needs, lambda: self.multi_modal_projector(self.vision_tower(pixels))
        )
        captured = {need: self._by_token(need, value) for need, value in found.items()}
        grids = ((self.side, self.side),)
        return [
            Picture(one, grids, {need: value[number] for need, value in captured.items()})
            for number, one in enumerate(features)
        ]

    def _by_token(self, need: Need, value: Tensor) -> Tensor:
        """(T, N, channels) of T crops, of patches (T, n, channels) where the tower was read."""
        if need.what in OF_PROJECTOR:
            return value
        patches = side_of(self.config)
        return averaged(value, (patches, patches), patches // self.side).unflatten(0, (len(value), -1))
