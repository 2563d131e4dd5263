# SPDX-License-Identifier: Apache-2.0
"""Families that vLLM has no class for, and runs in its wrapper of transformers.

The model is that of transformers, so that the adapter of the project reads its tower and says what its
encoder returned. The wrapper fuses projections and replaces linear layers, but attention still goes through
the functions of transformers, where it is watched. Only the projector cannot be looked into.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.model_executor.models.transformers.causal import CausalMixin
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig

from ...core.deferred import Checks, Explain
from ...errors import UnsupportedError, VlmPruneError
from ...hooks.vision.pictures import Picture
from ...models import adapter_class
from ...models.base import IMAGE
from ..names import KEY, PREFIX
from ..reduce import KeptRows, in_turns, with_breaks
from ..request import Request, TowerFacts
from .context import in_context
from .layouts import LAYOUTS, Grids, Size, TokenLayout, tokens_of
from .plugin import refusal
from .processor import PruningProcessor, from_field
from .towers import most_tokens, refuse_compiled, tile_by_tile

log = logging.getLogger(__name__)
PIXELS = IMAGE.pixels
Model: Any = nn.Module if TYPE_CHECKING else object  # the wrapper comes behind the mixin


def layout_of(config: Any) -> TokenLayout:
    """The layout of the family of a config."""
    # several families may share a class
    if config.model_type not in LAYOUTS:
        raise refusal(config.model_type)
    return LAYOUTS[config.model_type]


def facts_of(config: Any) -> TowerFacts:
    """Of a config; transformers loads the whole tower."""
    vision, layout = config.vision_config, layout_of(config)
    # several layers in VipLLaVA; older transformers call the field by the plural
    plural, single = (
        getattr(config, "vision_feature_layers", None),
        getattr(config, "vision_feature_layer", -1),
    )
    layers: Any = plural or single
    # of a tower of timm the last block alone is known by the config
    depth: Any = getattr(vision, "depth", None) or getattr(vision, "num_hidden_layers", 1)
    full = getattr(vision, "fullatt_block_indexes", None)
    return TowerFacts(
        cls=vision.model_type == "clip_vision_model",
        depth=depth,
        loaded=depth,
        layer=layers if isinstance(layers, int) else layers[0],
        tower=layout.reads,
        placed=layout.placed,
        projector=False,
        merges=layout.merges(config),
        full=None if full is None else tuple(full),
    )


class Failures(Checks):
    """Keeps what failed: a server goes on. Values that are not finite are found where pictures are cut.

    A server runs for weeks, so that every run is compared anew.
    """

    lasting: ClassVar[bool] = False

    def __init__(self) -> None:
        self.found: list[VlmPruneError] = []

    def require(self, ok: Tensor, explain: Explain) -> None:
        if not bool(ok):
            self.found.append(explain())

    def finite(self, values: Tensor, explain: Explain) -> None:
        pass


class WrappedInfo(MultiModalProcessingInfo):
    """Numbers of tokens without our words, of processors too that cannot count them."""

    # vLLM asks for it: clips are refused here, since nothing was measured with them
    _is_video_model: ClassVar[bool] = False

    def pictures(self, size: Size) -> Sequence[Grids]:
        """Blocks of every picture of an item, from its size."""
        config, options = self.ctx.model_config.hf_config, self.ctx.get_merged_mm_kwargs({})
        return layout_of(config).before(config, self.get_hf_processor(), size, options)

    def _get_num_mm_tokens(self, **sizes: Sequence[Sequence[int]]) -> Any:
        processor = self.get_hf_processor()
        if hasattr(processor, "_get_num_multimodal_tokens"):
            # vLLM's own gives it the options of the server as they are
            return processor._get_num_multimodal_tokens(**sizes, **self.ctx.get_merged_mm_kwargs({}))
        found = [self.pictures((height, width)) for height, width in sizes.get("image_sizes", ())]
        return {
            "num_image_tokens": [sum(map(tokens_of, item)) for item in found],
            "num_image_patches": [len(item) for item in found],
        }


class WrappedProcessor(PruningProcessor, MultiModalProcessor):
    """The processor of vLLM's wrapper that promises fewer placeholders."""

    counted: ClassVar[dict[str, str]] = {"image": "num_image_patches"}  # says how many tiles an item has

    @property
    def config(self) -> Any:
        return self.info.ctx.model_config.hf_config

    @property
    def breaks(self) -> bool:
        return layout_of(self.config).breaks is not None

    def facts(self) -> TowerFacts:
        return facts_of(self.config)

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        size = items.get_image_size(index)
        return self.info.pictures((size.height, size.width))

    def processed(self, items: Any, index: int, out: Any, options: Mapping[str, Any]) -> Sequence[Grids]:
        layout = layout_of(self.config)
        return layout.made(self.config, out["image"][index][layout.field].data)

    def _get_num_patches_per_image(self, mm_data: Mapping[str, Any]) -> list[int] | None:
        # vLLM's own asks the processor of transformers, which cannot count in every family
        sizes = [(image.height, image.width) for image in mm_data.get("images") or ()]
        return [len(self.info.pictures(size)) for size in sizes] or None

    def _get_num_image_patches(self, hf_inputs: Any, mm_data: Mapping[str, Any], num_images: int) -> Tensor:
        pixels = hf_inputs.get(PIXELS)
        if layout_of(self.config).axis == 1 and isinstance(pixels, Tensor):
            # (images, tiles, ...): those of all images in one row, which vLLM shares out
            hf_inputs[PIXELS] = pixels.flatten(0, 1)[None]
        return super()._get_num_image_patches(hf_inputs, mm_data, num_images)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        alone = {name: MultiModalFieldConfig.batched("image") for name in layout_of(self.config).alone}
        return {**fields, **alone}

    def _postprocess_hf_mm_data(
        self, mm_inputs: Any, hf_processor_mm_kwargs: Any, processed_data: Any
    ) -> Any:
        processed = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        if processed.get("image_replacement_ids") is not None:
            self._check_placeholders(processed)
        return processed

    def _check_placeholders(self, processed: Any) -> None:
        """Refuse placeholders that the model will not fill, which an option of a request can ask for."""
        layout = layout_of(self.config)
        texts = processed["image_replacement_ids"].split(processed["image_replacement_sizes"].tolist())
        for text, value in zip(texts, processed[layout.field], strict=True):
            made = sum(tokens_of(grids) + layout.newlines(grids) for grids in layout.made(self.config, value))
            # the placeholder is what occurs most often
            given = int((text == text.mode().values).sum())
            if given != made:
                raise UnsupportedError(
                    f"{given} placeholders for {made} visual tokens: options of the processor make a layout "
                    "that is not known here; leave them out"
                )


class PrunedWrapper(Model):
    """Mixed in before vLLM's wrappers: pictures are reduced behind the model's own encoder."""

    placed_by_slot: ClassVar[bool] = False  # the position of a token depends on which of its picture stay

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
        self.most, self.layout = most_tokens(vllm_config), layout_of(config)
        whole: Any = SimpleNamespace(model=self.model, config=config)  # all that an adapter reads of it
        self.adapter = adapter_class(config.model_type)(whole)
        self.breaks = self._break_token(vllm_config)

    def _break_token(self, vllm_config: Any) -> int | None:
        if self.layout.breaks is None:
            return None
        info = MULTIMODAL_REGISTRY.get_processing_info(vllm_config.model_config)
        return getattr(info.get_hf_processor(), self.layout.breaks)

    def recursive_replace(self) -> None:
        super().recursive_replace()
        for module in self.model.modules():
            if isinstance(module, nn.MultiheadAttention):
                # it reads the weight of this layer itself, and vLLM's layers for CPUs pack theirs away
                width, bias = module.embed_dim, module.out_proj.bias is not None
                plain: Any = nn.Linear(width, width, bias=bias, device="meta")
                module.out_proj = plain

    def embed_multimodal(self, **kwargs: Any) -> Any:
        field = kwargs.pop(KEY, None)
        if field is None or kwargs.get(PIXELS) is None:
            return super().embed_multimodal(**kwargs)
        sizes = kwargs[self.layout.field]
        items = [self.layout.made(self.config, value) for value in sizes]
        # for vLLM's own way only
        del kwargs["num_image_patches"]
        given = {name: value for name, value in kwargs.items() if value is not None}

        def encode(request: Request, some: slice) -> list[Picture]:
            rows = self.layout.pixels(sizes, some)
            return self._encode(
                request,
                {name: self._some(value, rows if name == PIXELS else some) for name, value in given.items()},
            )

        one_turn = tile_by_tile(
            encode, [len(item) for item in items], self._rows, in_place=self.placed_by_slot
        )
        return in_turns(from_field(field), [sum(map(tokens_of, item)) for item in items], self.most, one_turn)

    def _some(self, value: Any, some: slice) -> Any:
        return value[:, some] if self.layout.axis else value[some]

    def _encode(self, request: Request, given: dict[str, Any]) -> list[Picture]:
        if isinstance(given[PIXELS], Tensor):
            return self._read(request, given)
        # pictures of different sizes come as a list; each is encoded alone, so that none is filled up
        alone = [{name: value[at][None] for name, value in given.items()} for at in range(len(given[PIXELS]))]
        return [picture for one in alone for picture in self._read(request, one)]

    def _read(self, request: Request, given: dict[str, Any]) -> list[Picture]:
        capture, failures = self.adapter.capture(request.needs), Failures()
        capture.install()
        try:
            with capture.recording(failures) as record:
                beside = {name: value for name, value in given.items() if name != PIXELS}
                output = self._get_features("image", given[PIXELS], **beside)
        finally:
            capture.remove()
        try:
            self.adapter.check(given, IMAGE)
        # it speaks of what was read, and a server goes on
        except VlmPruneError as error:
            failures.found.append(error)
        found = record.take()
        if failures.found:
            log.error("vlmprune: %s: %s", request.text, failures.found[0])
            # what was read cannot be trusted: as if it were not finite, so that these pictures fall back
            found = {need: torch.full_like(value, torch.nan) for need, value in found.items()}
        return self.adapter.pictures(IMAGE, output, given, found, failures)

    def _rows(self, request: Request, picture: Picture, kept: KeptRows) -> Tensor:
        if self.breaks is None or request.budget is None:
            return kept.rows
        table = self.model.get_input_embeddings()
        token = torch.tensor([self.breaks], device=table.weight.device)
        return with_breaks(kept, picture.grids, table(token))


# vLLM asks for its wrapper by this name
@MULTIMODAL_REGISTRY.register_processor(
    WrappedProcessor, info=in_context(WrappedInfo), dummy_inputs=MultiModalDummyInputsBuilder
)
class TransformersMultiModalForCausalLM(PrunedWrapper, MultiModalMixin, CausalMixin):
    """A model of transformers whose tokens have one position each."""


def refuse_ranks(config: Any) -> None:
    """Refuse more than one rank, with which nothing was measured here."""
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(config, name) > 1:
            raise UnsupportedError(
                f"{name}={getattr(config, name)} was not measured with a family in vLLM's wrapper of "
                "transformers; start it on one rank"
            )
