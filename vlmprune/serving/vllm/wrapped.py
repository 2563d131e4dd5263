# SPDX-License-Identifier: Apache-2.0
"""Families that vLLM has no class for, and runs in its wrapper of transformers.

The model is that of transformers, so that the adapter of the project reads its tower and says what its
encoder returned. The wrapper fuses projections and replaces linear layers, but attention still goes through
the functions of transformers, where it is watched. Only the projector cannot be looked into.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.models.transformers.causal import CausalMixin
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.deferred import Checks, Explain
from ...errors import UnsupportedError, VlmPruneError
from ...hooks.vision.pictures import Picture
from ...models import adapter_class
from ...models.base import IMAGE
from ..names import KEY, PREFIX
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .processor import Grids, PruningProcessor, from_field
from .towers import most_tokens, refuse_compiled, tile_by_tile

log = logging.getLogger(__name__)


def _patches(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


# model type -> visual tokens along a side of a tile, from the config. In all of them a tile is a picture with
# a budget of its own, whose placeholders stand together
SIDES: dict[str, Callable[[Any], int]] = {
    "aya_vision": lambda config: _patches(config) // config.downsample_factor,
    "vipllava": _patches,
}


def facts_of(config: Any) -> TowerFacts:
    """Of a config; transformers loads the whole tower."""
    vision, side = config.vision_config, SIDES[config.model_type](config)
    # several layers in VipLLaVA; older transformers call the field by the plural
    layers = getattr(config, "vision_feature_layers", None) or config.vision_feature_layer
    return TowerFacts(
        cls=vision.model_type == "clip_vision_model",
        depth=vision.num_hidden_layers,
        loaded=vision.num_hidden_layers,
        layer=layers if isinstance(layers, int) else layers[0],
        projector=False,
        merges=(_patches(config) // side) ** 2,
    )


class Failures(Checks):
    """Keeps what failed: a server goes on. Values that are not finite are found where pictures are cut."""

    def __init__(self) -> None:
        self.found: list[VlmPruneError] = []

    def require(self, ok: Tensor, explain: Explain) -> None:
        if not bool(ok):
            self.found.append(explain())

    def finite(self, values: Tensor, explain: Explain) -> None:
        pass


class WrappedInfo(MultiModalProcessingInfo):
    """Asks the processor of transformers for numbers of tokens without our words."""

    def _get_num_mm_tokens(self, **sizes: Sequence[Sequence[int]]) -> Any:
        # vLLM's own gives it the options of the server as they are
        options = self.ctx.get_merged_mm_kwargs({})
        return self.get_hf_processor()._get_num_multimodal_tokens(**sizes, **options)


class WrappedProcessor(PruningProcessor, MultiModalProcessor):
    """The processor of vLLM's wrapper that promises fewer placeholders."""

    counted: ClassVar[dict[str, str]] = {"image": "num_image_patches"}  # says how many tiles an item has

    def facts(self) -> TowerFacts:
        return facts_of(self.info.ctx.model_config.hf_config)

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        size = items.get_image_size(index)
        found = self.info._get_num_mm_tokens(image_sizes=([size.height, size.width],))
        return self._tiles(found["num_image_patches"][0])

    def processed(self, items: Any, index: int, out: Any, options: Mapping[str, Any]) -> Sequence[Grids]:
        return self._tiles(int(out["image"][index]["num_image_patches"].data))

    def _tiles(self, count: int) -> Sequence[Grids]:
        config = self.info.ctx.model_config.hf_config
        side = SIDES[config.model_type](config)
        return [((side, side),)] * count


# vLLM asks for its wrapper by this name
@MULTIMODAL_REGISTRY.register_processor(
    WrappedProcessor, info=in_context(WrappedInfo), dummy_inputs=MultiModalDummyInputsBuilder
)
class TransformersMultiModalForCausalLM(MultiModalMixin, CausalMixin):
    """A model of transformers in vLLM's wrapper, whose pictures are reduced behind its own encoder."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_compiled(vllm_config)
        refuse_ranks(vllm_config.parallel_config)
        config = vllm_config.model_config.hf_config
        named = config.architectures
        # what the weights of a checkpoint are called depends on the name of the class
        config.architectures = [one.removeprefix(PREFIX) for one in named]
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        finally:
            config.architectures = named
        self.most, self.side = most_tokens(vllm_config), SIDES[config.model_type](config)
        whole: Any = SimpleNamespace(model=self.model, config=config)  # all that an adapter reads of it
        self.adapter = adapter_class(config.model_type)(whole)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        field = kwargs.pop(KEY, None)
        if field is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        tiles = [int(count) for count in kwargs["num_image_patches"].flatten()]
        one_turn = tile_by_tile(self._encode, kwargs["pixel_values"], tiles)
        return in_turns(from_field(field), [count * self.side**2 for count in tiles], self.most, one_turn)

    def _encode(self, request: Request, pixels: Tensor) -> list[Picture]:
        capture, failures = self.adapter.capture(request.needs), Failures()
        capture.install()
        try:
            with capture.recording(failures) as record:
                output = self._get_features("image", pixels)
        finally:
            capture.remove()
        found = record.take()
        if failures.found:
            log.error("vlmprune: %s: %s", request.text, failures.found[0])
            # what was read cannot be trusted: as if it were not finite, so that these pictures fall back
            found = {need: torch.full_like(value, torch.nan) for need, value in found.items()}
        return self.adapter.pictures(IMAGE, output, {IMAGE.pixels: pixels}, found, failures)


def refuse_ranks(config: Any) -> None:
    """Refuse more than one rank, with which nothing was measured here."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(config, name) > 1:
            raise UnsupportedError(
                f"{name}={getattr(config, name)} was not measured with a family in vLLM's wrapper of "
                "transformers; start it on one rank"
            )
