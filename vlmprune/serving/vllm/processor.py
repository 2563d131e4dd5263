# SPDX-License-Identifier: Apache-2.0
"""Before a family's processor: reads and checks the spec, promises as many placeholders as will be filled,
and puts the spec into the identity of every picture and beside its pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems, EmbeddingItems
from vllm.multimodal.processing import ProcessorInputs, PromptReplacement, PromptUpdateDetails

from ... import __version__
from ...errors import UnsupportedError, VlmPruneError
from ..names import DENSE, KEY, VERSION_KEY
from ..request import Request, TowerFacts, check_tower, read, rehearse, wanted
from ..tally import count_requested
from .layouts import Grids, tokens_of
from .plugin import check_release

if TYPE_CHECKING:
    from vllm.multimodal.processing import BaseMultiModalProcessor as Base
else:
    Base = object  # the family's processor comes behind the mixin

check_release()
log = logging.getLogger(__name__)
Share = tuple[int, int]  # tokens of a picture before and after


class WarmUp(ProcessorInputs):
    """Pictures that vLLM makes up at its start: no request, and not counted as one."""


@cache
def announce(spec: str) -> None:
    """Say once what is pruned where a request names nothing."""
    log.info("vlmprune %s: requests that name no spec are served under %s", __version__, spec)


class PruningProcessor(Base):
    """Mixed in before the processor of a family, which says what its pictures look like.

    An *item* is an image or a clip of a request. Most are one picture; where tiles have a budget of their
    own, as in InternVL, an item is several.
    """

    # of every modality that is pruned, the field that has one entry per item
    counted: ClassVar[dict[str, str]] = {"image": "pixel_values"}

    # --- what a family says -----------------------------------------------------------------------

    def facts(self) -> TowerFacts:
        """What is known of the tower from the config."""
        raise NotImplementedError

    def pictures(self, items: Any, index: int, options: Mapping[str, Any]) -> Sequence[Grids]:
        """Blocks of patches of every picture of an item, none where that is not known before it is processed.

        Args:
            options: of the request.
        """
        raise NotImplementedError

    def processed(self, items: Any, index: int, out: Any, options: Mapping[str, Any]) -> Sequence[Grids]:
        """The same, said by what was made of the items where that says it better."""
        return self.pictures(items, index, options)

    def checked_options(self, inputs: Any) -> Collection[str]:
        """Options of the processor that a request gave, and that are known to do no harm."""
        return ()

    @property
    def breaks(self) -> bool:
        """Whether tokens among those of a picture ride as rows of it.

        How many tokens of the picture stay in front of each is known only when it was encoded.
        """
        return False

    # --- what is the same for all -----------------------------------------------------------------

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        try:
            request = self._request(inputs)
            # in every case: options of the server alone are not part of vLLM's hash
            named = {**inputs.hf_processor_mm_kwargs, KEY: request.text, VERSION_KEY: __version__}
            result = super().apply(replace(inputs, hf_processor_mm_kwargs=named), timing_ctx)
        except VlmPruneError as error:  # the client's mistake: 400, not 500
            # half of a character, which JSON can hold and an answer cannot, is written out
            said = str(error).encode("utf-8", "backslashreplace").decode("utf-8")
            raise VLLMValidationError(said, parameter="mm_processor_kwargs") from error
        # behind the processor, so that refused requests are not counted
        for found in () if isinstance(inputs, WarmUp) else filter(None, self._items(inputs)):
            dense = [tokens_of(grids) for grids in found]
            count_requested(request.text, sum(dense), sum(map(request.count, dense)))
        return result

    def get_dummy_inputs(self, *args: Any, **options: Any) -> Any:
        # requests may ask for all tokens, so that memory and budgets are measured with all of them
        inputs = super().get_dummy_inputs(*args, **options)
        # at the start, where an operator reads it, and not at every request
        default = wanted({}, self._of_server(), self.info.ctx.model_config.hf_config)
        check_tower(default, self.facts())
        announce(default.text)
        named = {**inputs.hf_processor_mm_kwargs, KEY: DENSE, VERSION_KEY: __version__}
        return WarmUp(**{**vars(inputs), "hf_processor_mm_kwargs": named})

    def _of_server(self) -> Mapping[str, Any]:
        """Options that the server was started with."""
        return self.info.ctx.model_config.get_multimodal_config().mm_processor_kwargs or {}

    def _request(self, inputs: Any) -> Request:
        server = self._of_server()
        refuse_options(inputs.hf_processor_mm_kwargs, server, self.checked_options(inputs))
        request = wanted(inputs.hf_processor_mm_kwargs, server, self.info.ctx.model_config.hf_config)
        if request.budget is None:
            return request
        for modality, items in inputs.mm_data_items.items():
            if isinstance(items, EmbeddingItems | DictEmbeddingItems):
                raise UnsupportedError(
                    f"{request.text!r} was asked for with {modality} embeddings, whose rows were chosen "
                    f"elsewhere; send pixels, or ask for {DENSE!r}"
                )
            if modality not in self.counted:
                raise UnsupportedError(
                    f"{request.text!r} was asked for with a {modality}, which cannot be pruned in this model "
                    f"here; send {' or '.join(self.counted)} only, or ask for {DENSE!r}"
                )
            for index in range(len(items)):
                if items.get(index) is not None:  # named by a uuid alone: rehearsed when it was first sent
                    self._rehearse(
                        request, modality, self.pictures(items, index, inputs.hf_processor_mm_kwargs)
                    )
        return request

    def _rehearse(self, request: Request, modality: str, pictures: Sequence[Grids]) -> None:
        for grids in dict.fromkeys(pictures):
            rehearse(request.text, self.facts(), grids, modality == "video")

    def _items(self, inputs: Any) -> Iterable[Sequence[Grids]]:
        """What is known beforehand of every item that has pixels."""
        for modality in self.counted:
            items = inputs.mm_data_items.get(modality)
            if items is None or isinstance(items, EmbeddingItems | DictEmbeddingItems):
                continue
            for index in range(len(items)):
                if items.get(index) is not None:
                    yield self.pictures(items, index, inputs.hf_processor_mm_kwargs)

    def _postprocess_hf_mm_data(
        self, mm_inputs: Any, hf_processor_mm_kwargs: Any, processed_data: Any
    ) -> Any:
        processed = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        for modality, name in self.counted.items():
            if processed.get(name) is not None:
                spec = as_field(hf_processor_mm_kwargs[KEY], len(processed[name]))
                processed[field_name(modality)] = spec
        return processed

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        ours = {
            # a spec is read by the host, which would wait for a copy on the device
            field_name(modality): MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality in self.counted
        }
        return {**fields, **ours}

    # the names of these arguments are vLLM's: it gives them by name
    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        request = read(hf_processor_mm_kwargs[KEY])
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        if request.budget is None:
            return updates

        def shares(modality: str, index: int) -> list[Share]:
            found = self.processed(mm_items[modality], index, out_mm_kwargs, hf_processor_mm_kwargs)
            # again, since options of the processor may have made another shape of it
            self._rehearse(request, modality, found)
            dense = [tokens_of(grids) for grids in found]
            return [(n, request.count(n)) for n in dense]

        return [
            _pruned(update, shares, self.breaks) if update.modality in self.counted else update
            for update in updates
        ]


def refuse_options(
    given: Mapping[str, object], server: Mapping[str, object], checked: Collection[str] = ()
) -> None:
    """Refuse options of the processor of transformers in a request, but for ``checked`` and those that the
    server has.

    Pictures of another shape than the model reads raise in the engine, which ends the server for all.
    """
    ours = (KEY, VERSION_KEY, *checked)
    # null is a value too: ``do_resize: null`` leaves a picture as large as it is
    other = [
        name
        for name, value in given.items()
        if name not in ours and (name not in server or server[name] != value)
    ]
    if other:
        raise UnsupportedError(
            f"a request gave {brief(other)} to the processor, and pictures of another shape end the model "
            f"for all clients; give {KEY!r} alone, and others to the server, with --mm-processor-kwargs"
        )


def _pruned(update: Any, shares: Callable[[str, int], list[Share]], breaks: bool) -> Any:
    """An update of the prompt that stands for fewer tokens."""
    dense = update.replacement

    def replacement(index: int) -> Any:
        # vLLM takes the replacement itself, or a function of the item
        given = dense(index) if callable(dense) else dense
        return without(given, shares(update.modality, index), breaks)

    return PromptReplacement(modality=update.modality, target=update.target, replacement=replacement)


def field_name(modality: str) -> str:
    """The name under which specs ride beside the items of a modality."""
    return KEY if modality == "image" else f"{KEY}_{modality}"


def without(given: Any, shares: Sequence[Share], breaks: bool = False) -> Any:
    """The text that stands for an item with placeholders left out, of every picture of it as many as are cut.

    Those of a picture are all alike, so that it does not matter which ones go; what stands between them
    stays.

    Args:
        breaks: what stands between those of a picture rides as a row of it, and gets a placeholder too.
    """
    if not breaks and all(dense == kept for dense, kept in shares):
        return given
    full = list(given.full) if isinstance(given, PromptUpdateDetails) else list(given)
    embed = _placeholder(given, full)
    places = [at for at, token in enumerate(full) if token == embed]
    if breaks:
        places = list(range(places[0], places[-1] + 1))
        full[places[0] : places[-1] + 1] = [embed] * len(places)
    if len(places) < sum(dense for dense, _ in shares):
        raise UnsupportedError(
            f"{len(places)} placeholders for {sum(dense for dense, _ in shares)} visual tokens: options of "
            "the processor make a layout that is not known here; leave them out"
        )
    left_out: set[int] = set()
    start = 0
    for number, (dense, kept) in enumerate(shares):
        # newlines have placeholders too, where an item is one picture
        end = len(places) if number == len(shares) - 1 else start + dense
        left_out.update(places[end - (dense - kept) : end])
        start = end
    left = [token for at, token in enumerate(full) if at not in left_out]
    return (
        PromptUpdateDetails.select_token_id(left, embed) if isinstance(given, PromptUpdateDetails) else left
    )


def _placeholder(given: Any, full: Sequence[int]) -> int:
    """The token that stands for a visual one."""
    if isinstance(given, PromptUpdateDetails) and given.is_embed is not None:
        # a clip of small frames has more words between them than placeholders
        return full[given.is_embed(list(full)).nonzero()[0].item()]
    # what occurs most often
    return max(set(full), key=full.count)


def as_field(text: str, items: int) -> Tensor:
    """A spec as (items, length) bytes, to ride beside the pixels of every picture."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8).repeat(items, 1)


def from_field(value: Tensor | Sequence[Tensor]) -> list[str]:
    """The specs of pictures, from one tensor, or from a list where their lengths differ."""
    return [bytes(row.flatten().tolist()).decode() for row in value]
