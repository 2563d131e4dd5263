# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5 in vLLM: one crop per picture, CLIP or SigLIP, patches in raster order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.model_executor.models import llava as base
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...errors import UnsupportedError
from ...hooks.vision.pictures import CLS_FEATURES, Picture
from ..names import KEY
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .processor import Grids, PruningProcessor, from_field
from .towers import WatchedTower, cut, most_tokens, plain_projector, refuse_compiled

Model: Any = nn.Module if TYPE_CHECKING else object  # the family's class comes behind the mixin


def check_config(config: Any) -> None:
    """Refuse models whose features are put together in ways that are not read here."""
    if config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise UnsupportedError(
            f"a vision tower of type {config.vision_config.model_type!r}; expected CLIP or SigLIP"
        )
    if config.vision_feature_select_strategy == "full" and has_cls(config):
        raise UnsupportedError("vision_feature_select_strategy='full' hands [CLS] on; expected 'default'")
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedError(f"features of layers {config.vision_feature_layer}; expected those of one")


def has_cls(config: Any) -> bool:
    return config.vision_config.model_type == "clip_vision_model"


def side_of(config: Any) -> int:
    """Patches along a side of a crop."""
    return config.vision_config.image_size // config.vision_config.patch_size


def facts_of(config: Any, quantized: bool) -> TowerFacts:
    """Of a LLaVA-like config; the weights of a quantised projector cannot be read."""
    depth = config.vision_config.num_hidden_layers
    return TowerFacts(
        cls=has_cls(config),
        depth=depth,
        loaded=base._get_num_hidden_layers(config),
        layer=config.vision_feature_layer,
        projector=not quantized,
    )


class OfLlava(PruningProcessor):
    """What processors of LLaVA-like models say alike."""

    def facts(self) -> TowerFacts:
        config = self.info.ctx.model_config
        return facts_of(config.hf_config, config.quantization is not None)

    @property
    def side(self) -> int:
        """Patches along a side of a crop."""
        return side_of(self.info.ctx.model_config.hf_config)


class PrunedLlava(Model):
    """Mixed in before the model of a LLaVA-like family, whose pictures are reduced behind the projector."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        check_config(config)
        refuse_compiled(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.side = side_of(config)
        self.most = most_tokens(vllm_config)
        depth, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
        self.watched = WatchedTower(self.vision_tower, self.multi_modal_projector, layer, depth)
        self.quantized = vllm_config.model_config.quantization is not None
        self.plain: list[nn.Module] = []  # in a list: no sub-module, its weights are not in the checkpoint

    def most_crops(self) -> int:
        """Crops of the largest picture."""
        return 1

    def encode(self, request: Request, **kwargs: Any) -> list[Picture]:
        """Pictures with what a request reads of them; ``kwargs`` are as ``embed_multimodal`` gets them."""
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        self.plain = [] if self.quantized else [plain_projector(self.multi_modal_projector)]
        return loaded

    def embed_multimodal(self, **kwargs: Any) -> Any:
        # vLLM's class does not know the field. Without it, or for embeddings, there is nothing to cut
        field = kwargs.pop(KEY, None)
        if field is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        projector = self.plain[0] if self.plain else None

        def one_turn(start: int, end: int, request: Request) -> list[Tensor]:
            some = {name: value[start:end] for name, value in kwargs.items() if value is not None}
            return [kept.rows for kept in cut(self.encode(request, **some), request, projector)]

        specs = from_field(field)
        # an upper bound: every picture is taken for the largest
        return in_turns(specs, [self.side**2 * self.most_crops()] * len(specs), self.most, one_turn)


class LlavaProcessor(OfLlava, base.LlavaMultiModalProcessor):
    """The processor of LLaVA-1.5 that promises fewer placeholders."""

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        return [((self.side, self.side),)]


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=in_context(base.LlavaProcessingInfo), dummy_inputs=base.LlavaDummyInputsBuilder
)
class LlavaForConditionalGeneration(PrunedLlava, base.LlavaForConditionalGeneration):
    """LLaVA-1.5: one crop per picture, patches in raster order."""

    def encode(self, request: Request, **kwargs: Any) -> list[Picture]:
        dense = base.LlavaForConditionalGeneration.embed_multimodal
        features, found = self.watched.run(request.needs, lambda: dense(self, **kwargs))
        grids, n = ((self.side, self.side),), self.side**2
        return [
            Picture(
                one,
                grids,
                {
                    # what stands in front of the n patches is [CLS]
                    need: value[number] if need == CLS_FEATURES else value[number, value.shape[1] - n :]
                    for need, value in found.items()
                },
            )
            for number, one in enumerate(features)
        ]
