# SPDX-License-Identifier: Apache-2.0
"""Before a family's processor: reads and checks the spec, promises as many placeholders as will be filled,
and puts the spec into the identity of every picture and beside its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from ... import __version__
from ...errors import UnsupportedError, VlmPruneError
from ..names import DENSE, KEY, VERSION_KEY
from ..request import Request, TowerFacts, read, rehearse, wanted
from ..tally import count_requested
from .plugin import check_release

if TYPE_CHECKING:
    from vllm.multimodal.processing import BaseMultiModalProcessor as Base
else:
    Base = object  # the family's processor comes behind the mixin

check_release()
Grids = tuple[tuple[int, int], ...]


class PruningProcessor(Base):
    """Mixed in before the processor of a family, which says what its pictures look like."""

    pixels = "pixel_values"  # the field that has one entry per picture

    # --- what a family says -----------------------------------------------------------------------

    def facts(self) -> TowerFacts:
        """What is known of the tower from the config."""
        raise NotImplementedError

    def grids(self, images: Any, index: int) -> Grids:
        """Blocks of patches of a picture."""
        raise NotImplementedError

    # --- what is the same for all -----------------------------------------------------------------

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        try:
            request = self._request(inputs)
        except VlmPruneError as error:  # the client's mistake: 400, not 500
            raise VLLMValidationError(str(error), parameter="mm_processor_kwargs") from error
        # in every case: options of the server alone are not part of vLLM's hash
        named = {**inputs.hf_processor_mm_kwargs, KEY: request.text, VERSION_KEY: __version__}
        result = super().apply(replace(inputs, hf_processor_mm_kwargs=named), timing_ctx)
        self._count(request, inputs, result)
        return result

    def get_dummy_inputs(self, *args: Any, **options: Any) -> Any:
        # requests may ask for all tokens, so that memory and budgets are measured with all of them
        inputs = super().get_dummy_inputs(*args, **options)
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: DENSE})

    def _request(self, inputs: Any) -> Request:
        config = self.info.ctx.model_config
        server = config.get_multimodal_config().mm_processor_kwargs
        request = wanted(inputs.hf_processor_mm_kwargs, server, config.hf_config)
        images = inputs.mm_data_items.get("image")
        if request.budget is None or not images:
            return request
        if isinstance(images, ImageEmbeddingItems):
            raise UnsupportedError(
                f"{request.text!r} was asked for with image embeddings, whose rows were chosen elsewhere; "
                f"send pixels, or ask for {DENSE!r}"
            )
        for grids in {self.grids(images, index) for index in range(len(images))}:
            rehearse(request.text, self.facts(), grids)
        return request

    def _count(self, request: Request, inputs: Any, result: Any) -> None:
        images = inputs.mm_data_items.get("image")
        if not images or isinstance(images, ImageEmbeddingItems):
            return
        patches = [
            sum(rows * cols for rows, cols in self.grids(images, index)) for index in range(len(images))
        ]
        count_requested(request.text, patches, [request.count(n) for n in patches])

    def _postprocess_hf_mm_data(
        self, mm_inputs: Any, hf_processor_mm_kwargs: Any, processed_data: Any
    ) -> Any:
        processed = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        if processed.get(self.pixels) is not None:
            processed[KEY] = as_field(hf_processor_mm_kwargs[KEY], len(processed[self.pixels]))
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, KEY: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    # the names of these arguments are vLLM's: it gives them by name
    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        request = read(hf_processor_mm_kwargs[KEY])
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if request.budget is None:
            return updates
        return [self._pruned(update, request, mm_items) for update in updates]

    def _pruned(self, update: Any, request: Request, mm_items: Any) -> Any:
        if update.modality != "image":
            return update
        dense = update.replacement

        def replacement(index: int) -> Any:
            patches = sum(rows * cols for rows, cols in self.grids(mm_items["image"], index))
            given = dense(index) if callable(dense) else dense
            return without(given, patches - request.count(patches))

        return PromptReplacement(modality="image", target=update.target, replacement=replacement)


def without(given: Any, surplus: int) -> Any:
    """The text that stands for a picture with ``surplus`` of its placeholders left out.

    They are all alike, so that it does not matter which ones go; what stands between them stays.
    """
    full = list(given.full) if isinstance(given, PromptUpdateDetails) else list(given)
    embed = max(set(full), key=full.count)
    left = []
    for token in reversed(full):
        if token == embed and surplus:
            surplus -= 1
            continue
        left.append(token)
    left.reverse()
    return (
        PromptUpdateDetails.select_token_id(left, embed) if isinstance(given, PromptUpdateDetails) else left
    )


def as_field(text: str, items: int) -> Tensor:
    """A spec as (items, length) bytes, to ride beside the pixels of every picture."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8).repeat(items, 1)


def from_field(value: Tensor | Sequence[Tensor]) -> list[str]:
    """The specs of pictures, from one tensor, or from a list where their lengths differ."""
    return [bytes(row.flatten().tolist()).decode() for row in value]
