# SPDX-License-Identifier: Apache-2.0
"""What the decoder layers of a shortened sequence are given: attention masks and rotary angles, made by the
model itself.

Every function here hands the model's own mask builders and rotary module a sequence that is consistent in
itself: slots really held, columns really fed. Nothing of any family is written a second time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, create_causal_mask

from ...errors import UnsupportedError
from .cache import cache_name
from .compaction import Compaction


@dataclass(frozen=True, eq=False)
class TokenTypes:
    """What each new token is, for models that make their masks by that before the language model (PaliGemma,
    Gemma 3).

    Args:
        new: (B, n) token types.
        text: the type of tokens that attend to earlier ones only, as everything held from before does.
        make: the model's own function from tokens and types to masks.
        config: of the whole model.
        keyword: what that function calls the types.
    """

    new: Tensor
    text: int
    make: Callable[..., Any]
    config: Any
    keyword: str = "token_type_ids"

    def cut(self, compaction: Compaction) -> TokenTypes:
        return replace(self, new=self.new.gather(1, compaction.index.long().to(self.new.device)))

    def masks(self, hidden: Tensor, valid: Tensor, cache: Any) -> Any:
        """A mask, or one per kind of layer, for the new tokens over all (B, P + n) slots."""
        # what was held before is read as text: its own masks were used when it was read
        held = self.new.new_full((valid.shape[0], valid.shape[1] - self.new.shape[1]), self.text)
        return self.make(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=valid,
            position_ids=None,
            is_first_iteration=True,
            **{self.keyword: torch.cat([held, self.new], dim=1)},
            **{cache_name(parameters_of(self.make)): cache},
        )


@dataclass(eq=False, repr=False)
class LayerView:
    """A cache that answers for one layer: mask builders always ask about the first one."""

    _cache: Any
    _layer: int

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self._cache.get_seq_length(self._layer)

    def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query, self._layer)

    def get_query_offset(self, layer_idx: int | None = None) -> Any:
        return self._cache.get_query_offset(self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def causal_mask(
    config: Any, kind: str, layer: int, hidden: Tensor, valid: Tensor | None, held: int, cache: Any
) -> Any:
    """The mask that the model would make for a layer of this kind.

    Args:
        hidden: (B, n, D) what the layer reads; for its shape, dtype and device only.
        valid: (B, P + n) bool, None where no mask is needed; a static cache still needs one, for its empty
            slots.
        held: P, slots held before this call.
    """
    # what transformers itself would call, so that every attention implementation gets its own form
    make = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
    known = parameters_of(make)
    arguments = {
        "config": config,
        "inputs_embeds" if "inputs_embeds" in known else "input_embeds": hidden,  # renamed in transformers 5
        "attention_mask": valid,
        cache_name(known): None if cache is None else LayerView(cache, layer),
        "position_ids": None,
    }
    if valid is not None and hidden.device.type != "cpu" and "allow_is_causal_skip" in known:
        arguments["allow_is_causal_skip"] = False  # whether the mask can be left out is asked of the device
    if known.get("cache_position"):
        arguments["cache_position"] = torch.arange(held, held + hidden.shape[1], device=hidden.device)
    return make(**arguments)


_PARAMETERS: dict[Callable[..., Any], dict[str, bool]] = {}


def parameters_of(function: Callable[..., Any]) -> dict[str, bool]:
    """Names of its parameters, and whether they must be given; read once: it takes long, and no graph can."""
    if function not in _PARAMETERS:
        _PARAMETERS[function] = {
            name: one.default is inspect.Parameter.empty
            for name, one in inspect.signature(function).parameters.items()
        }
    return _PARAMETERS[function]


# transformers before 5.5 makes masks from numbers of slots; read here, since a graph cannot read it
ASKS_FOR_PLACES = parameters_of(create_causal_mask).get("cache_position", False)


def layer_kind(config: Any, layer: int) -> str:
    """ "full_attention", "sliding_attention" and so on, as the model chooses its mask for this layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"


def check_kinds(config: Any, layers: Iterable[int], method: str) -> None:
    """Refuse cuts before layers whose masks cannot be made again."""
    for layer in layers:
        kind = layer_kind(config, layer)
        if not callable(LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(kind)):
            raise UnsupportedError(
                f"{method} cuts inside the language model, but layer {layer} of this {config.model_type} is "
                f"of kind {kind!r}, whose mask cannot be made again after a cut; prune before the language "
                "model, e.g. with 'divprune@64'"
            )


def uses_flash(config: Any) -> bool:
    """Whether a model runs on FlashAttention, which reads gaps in position ids as packed sequences."""
    return "flash" in str(config._attn_implementation)


def no_positions(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A pre-hook for layers on FlashAttention, whose rotary angles were made of positions already."""
    return args, {**kwargs, "position_ids": None}


def angle_kind(language_model: nn.Module, layer: int) -> str | None:
    """The kind of a layer where each kind has rotary angles of its own (Gemma 3), else None."""
    rotary = getattr(language_model, "rotary_emb", None)  # some hybrids do not rotate at all
    made_by: type[Any] = type(rotary)
    if rotary is None or "layer_type" not in parameters_of(made_by.forward):
        return None
    config: Any = language_model.config
    return config.layer_types[layer]


def rotary_frequencies(language_model: nn.Module, layer: int) -> Tensor | None:
    """(d / 2,) frequencies of the rotary angles of a layer, None where none are found."""
    kind = angle_kind(language_model, layer)
    # read anew each time: rotary modules for long texts replace their frequencies
    rotary = getattr(language_model, "rotary_emb", None)
    return getattr(rotary, "inv_freq" if kind is None else f"{kind}_inv_freq", None)
