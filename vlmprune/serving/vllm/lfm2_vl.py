# SPDX-License-Identifier: Apache-2.0
"""LFM2-VL in vLLM: pictures of any size, large ones as tiles with a budget of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from vllm.model_executor.models import lfm2_vl as base
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.method import Need
from ...hooks.vision.capture import OF_PROJECTOR
from ...hooks.vision.pictures import Picture
from ...models.merging import averaged
from ..names import KEY
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .layouts import tokens_of
from .processor import Grids, PruningProcessor, from_field
from .towers import WatchedTower, most_tokens, refuse_compiled, tile_by_tile


def grids_of(config: Any, shapes: Tensor) -> list[Grids]:
    """Of every tile, whose rows and columns of patches are ``shapes`` (tiles, 2)."""
    merge = config.downsample_factor
    return [((rows // merge, cols // merge),) for rows, cols in shapes.tolist()]


class PackedTilesProcessor(PruningProcessor, base.Lfm2VLMultiModalProcessor):
    """The processor of LFM2-VL that promises fewer placeholders."""

    counted: ClassVar[dict[str, str]] = {"image": "num_patches"}  # says how many tiles an item has

    def facts(self) -> TowerFacts:
        config = self.info.get_hf_config()
        depth, merges = config.vision_config.num_hidden_layers, config.downsample_factor**2
        return TowerFacts(cls=False, depth=depth, loaded=depth, layer=-1, projector=False, merges=merges)

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        size, processor = items.get_image_size(index), self.info.get_hf_processor(**options)
        images = processor.image_processor
        across, down, _ = self.info._get_image_feature_grid_size(
            image_width=size.width, image_height=size.height, processor=processor, mm_kwargs=options
        )
        names = ("downsample_factor", "min_image_tokens", "max_image_tokens", "encoder_patch_size")
        limits = {name: getattr(images, name) for name in names}
        wide, high = self.info.smart_resize(size.height, size.width, **limits)
        token = images.encoder_patch_size * images.downsample_factor  # pixels along its side
        whole, side = ((high // token, wide // token),), images.tile_size // token
        tiles = across * down
        return [whole] if tiles == 1 else [((side, side),)] * tiles + [whole]

    def processed(self, items: Any, index: int, out: Any, options: Mapping[str, Any]) -> Sequence[Grids]:
        return grids_of(self.info.get_hf_config(), out["image"][index]["spatial_shapes"].data)


@MULTIMODAL_REGISTRY.register_processor(
    PackedTilesProcessor,
    info=in_context(base.Lfm2VLProcessingInfo),
    dummy_inputs=base.Lfm2VLDummyInputsBuilder,
)
class Lfm2VlForConditionalGeneration(base.Lfm2VLForConditionalGeneration):
    """LFM2-VL: most layers of its decoder keep a running state."""

    def __init__(self, *, vllm_config: Any, prefix: str = "model") -> None:
        refuse_compiled(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.most, self.merge = most_tokens(vllm_config), self.config.downsample_factor
        # what is given the patches of a token side by side
        first = getattr(self.multi_modal_projector, "layer_norm", self.multi_modal_projector.linear_1)
        depth = self.config.vision_config.num_hidden_layers
        self.watched = WatchedTower(self.vision_tower, first, -1, depth)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        field = kwargs.pop(KEY, None)
        pixels = kwargs.get("pixel_values")
        if field is None or pixels is None:
            return super().embed_multimodal(**kwargs)
        shapes, counts = kwargs["spatial_shapes"], kwargs["num_patches"].tolist()
        each = [tokens_of(grids) for grids in grids_of(self.config, shapes)]
        # (tokens,) of every item
        sizes = [sum(each[sum(counts[:at]) :][:count]) for at, count in enumerate(counts)]
        one_turn = tile_by_tile(
            lambda request, some: self._encode(request, pixels[some], shapes[some]), counts
        )
        return in_turns(from_field(field), sizes, self.most, one_turn)

    def _encode(self, request: Request, pixels: Tensor, shapes: Tensor) -> list[Picture]:
        lengths = shapes.prod(-1).tolist()
        features, found = self.watched.run(
            request.needs, lambda: self.image_pixels_to_features(pixels, shapes), lengths
        )
        captured = {need: self._by_token(need, value, shapes) for need, value in found.items()}
        return [
            Picture(one, grids, {need: value[number] for need, value in captured.items()})
            for number, (one, grids) in enumerate(zip(features, grids_of(self.config, shapes), strict=True))
        ]

    def _by_token(self, need: Need, value: Tensor, shapes: Tensor) -> list[Tensor]:
        """(N, channels) of every tile; the projector is given rows of tokens already."""
        lengths, packed = shapes.prod(-1), value.flatten(0, -2)
        if need.what in OF_PROJECTOR:
            return list(packed.split((lengths // self.merge**2).tolist()))
        patches = packed.split(lengths.tolist())
        return [
            averaged(one[None], (rows, cols), self.merge)
            for one, (rows, cols) in zip(patches, shapes.tolist(), strict=True)
        ]
