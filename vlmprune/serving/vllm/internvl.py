# SPDX-License-Identifier: Apache-2.0
"""InternVL and Qianfan-OCR in vLLM: an item is all tiles of a picture, each with a budget of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from vllm.model_executor.models import interns1 as base
from vllm.model_executor.models import internvl, qianfan_ocr
from vllm.multimodal import MULTIMODAL_REGISTRY

from ...core.method import Need
from ...errors import UnsupportedError
from ...hooks.vision.pictures import Picture
from ...models.internvl import shuffled_mean
from ..names import KEY, VERSION_KEY
from ..reduce import in_turns
from ..request import Request, TowerFacts
from .context import in_context
from .processor import Grids, PruningProcessor, from_field
from .towers import WatchedTower, most_tokens, refuse_compiled, tile_by_tile

Model: Any = nn.Module if TYPE_CHECKING else object  # the family's class comes behind the mixin


def side_of(config: Any) -> int:
    """Patches along a side of a tile."""
    vision = config.vision_config
    # both are numbers in some configs, and pairs in others
    size, patch = (one if isinstance(one, int) else one[0] for one in (vision.image_size, vision.patch_size))
    return size // patch


def tokens_of(config: Any) -> int:
    """Visual tokens along a side of a tile."""
    return round(side_of(config) * config.downsample_ratio)


class OfShuffled(PruningProcessor):
    """What processors of both say alike."""

    counted: ClassVar[dict[str, str]] = {"image": "image_num_patches"}

    def facts(self) -> TowerFacts:
        config = self.info.ctx.model_config.hf_config
        depth = config.vision_config.num_hidden_layers
        return TowerFacts(
            cls=True,
            depth=depth,
            loaded=depth,
            layer=-1,
            projector=False,
            # 4 at a ratio of 0.5
            merges=round(1 / config.downsample_ratio) ** 2,
        )

    def processed(self, items: Any, index: int, out: Any, options: Mapping[str, Any]) -> Sequence[Grids]:
        return self._tiles(int(out["image"][index]["image_num_patches"].data))

    def _tiles(self, count: int) -> Sequence[Grids]:
        side = tokens_of(self.info.ctx.model_config.hf_config)
        return [((side, side),)] * count


class PrunedShuffled(Model):
    """Mixed in before both models, which shuffle the patches of a token side by side."""

    pixels: ClassVar[str] = "pixel_values"  # what vLLM's class calls them

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        refuse_compiled(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        tower, projector = self.parts()
        self.watched = WatchedTower(tower, projector, -1, config.vision_config.num_hidden_layers)
        self.most, self.grid = most_tokens(vllm_config), (tokens_of(config), tokens_of(config))

    def parts(self) -> tuple[nn.Module, nn.Module]:
        """The tower and the projector."""
        raise NotImplementedError

    def embed_multimodal(self, **kwargs: Any) -> Any:
        field, pixels = kwargs.pop(KEY, None), kwargs.get(self.pixels)
        if field is None or pixels is None:
            return super().embed_multimodal(**kwargs)
        tiles = [int(count) for count in kwargs["image_num_patches"]]
        one_turn = tile_by_tile(lambda request, some: self._encode(request, pixels[some]), tiles)
        each = self.grid[0] * self.grid[1]
        return in_turns(from_field(field), [count * each for count in tiles], self.most, one_turn)

    def _encode(self, request: Request, pixels: Tensor) -> list[Picture]:
        features, found = self.watched.run(request.needs, lambda: self.extract_feature(pixels))
        patches = side_of(self.config) ** 2
        captured = {need: self._by_token(need, value, patches) for need, value in found.items()}
        return [
            Picture(one, (self.grid,), {need: value[number] for need, value in captured.items()})
            for number, one in enumerate(features)
        ]

    def _by_token(self, need: Need, value: Tensor, patches: int) -> Sequence[Tensor]:
        """(N, channels) of every tile; the projector is given shuffled patches already."""
        if need.what == "encoder_features":
            return list(value)
        side = side_of(self.config)
        # what stands in front of the patches is [CLS]
        of_patches = value[:, value.shape[1] - patches :]
        return [shuffled_mean(one, (side, side), self._shuffle) for one in of_patches]

    def _shuffle(self, channels: Tensor) -> Tensor:
        return self.pixel_shuffle(channels, scale_factor=self.downsample_ratio).flatten(1, 2)


class InternVLInfo(base.InternS1ProcessingInfo):
    """Gives options to a processor without asking the context, so that our words are dropped here too."""

    def get_hf_processor(self, **kwargs: object) -> Any:
        ours = (KEY, VERSION_KEY)
        return super().get_hf_processor(**{name: kwargs[name] for name in kwargs if name not in ours})


class InternVLProcessor(OfShuffled, base.InternS1MultiModalProcessor):
    """The processor of InternVL that promises fewer placeholders for images."""

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        size, processor = items.get_image_size(index), self.info.get_hf_processor(**options)
        tokens = self.info.get_num_image_tokens(
            image_width=size.width, image_height=size.height, processor=processor, mm_kwargs=options
        )
        # all tiles have equally many tokens
        return self._tiles(tokens // processor.image_seq_length)


@MULTIMODAL_REGISTRY.register_processor(
    InternVLProcessor, info=in_context(InternVLInfo), dummy_inputs=base.InternS1DummyInputsBuilder
)
class InternVLForConditionalGeneration(PrunedShuffled, base.InternS1ForConditionalGeneration):
    """InternVL: patches are shuffled, four to a token as released."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_layer(vllm_config.model_config.hf_config.vision_feature_layer)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.vision_tower, self.multi_modal_projector


class QianfanOCRProcessor(OfShuffled, internvl.BaseInternVLMultiModalProcessor):
    """The processor of Qianfan-OCR that promises fewer placeholders for images."""

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        size, processor = items.get_image_size(index), self.info.get_hf_processor(**options)
        tokens = processor.get_num_image_tokens(image_width=size.width, image_height=size.height)
        return self._tiles(tokens // processor.image_seq_length)


@MULTIMODAL_REGISTRY.register_processor(
    QianfanOCRProcessor,
    info=in_context(qianfan_ocr.QianfanOCRProcessingInfo),
    dummy_inputs=internvl.BaseInternVLDummyInputsBuilder,
)
class QianfanOCRForConditionalGeneration(PrunedShuffled, qianfan_ocr.QianfanOCRForConditionalGeneration):
    """Qianfan-OCR: the processor is vLLM's own."""

    pixels: ClassVar[str] = "pixel_values_flat"

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_layer(vllm_config.model_config.hf_config.select_layer)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def parts(self) -> tuple[nn.Module, nn.Module]:
        return self.vision_model, self.mlp1


def check_layer(layer: int) -> None:
    """Refuse features of another layer than the last."""
    if layer != -1:
        raise UnsupportedError(f"features of layer {layer}; expected the last, -1")
