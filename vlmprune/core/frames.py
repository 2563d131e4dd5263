# SPDX-License-Identifier: Apache-2.0
"""Frames: how a group of decoder layers sees the sequence: slots held, validity, positions, and the masks made from them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

from ..errors import UnsupportedError
from .cache import cache_name
from .compaction import Compaction


@dataclass(eq=False)
class Frame:
    """The sequence as the layers from ``start`` on see it in one call.

    Args:
        start: first layer of the group.
        past: (B, P) bool, validity of the slots held before this call.
        fed: (B, n) bool, validity of the slots fed in this call.
        position_ids: (B or 1, n); (3 or 4, B, n) where tokens have places in a picture (M-RoPE), four with their numbers first.
        lost: (B,) tokens compacted away so far in this group, past turns included.
        maskless: the mask may stay None: everything is valid and one token is fed.
        types: what each fed token is, where the model lets some tokens attend both ways and makes its masks by that.
    """

    start: int
    past: Tensor
    fed: Tensor
    position_ids: Tensor
    lost: Tensor
    maskless: bool = False
    types: TokenTypes | None = None
    _masks: dict[str, Any] = field(default_factory=dict)
    _angles: dict[str | None, Any] = field(default_factory=dict)

    @property
    def valid(self) -> Tensor:
        """(B, P + n) bool."""
        return torch.cat([self.past, self.fed], dim=1)

    @property
    def width(self) -> int:
        """P + n, slots held after this call."""
        return self.past.shape[1] + self.fed.shape[1]

    def cut(self, compaction: Compaction, policy: str, start: int | None = None) -> Frame:
        """This frame after a cut, for the layers from ``start`` on."""
        lost = self.lost + compaction.lost.to(self.lost.device) if policy == "compact" else self.lost
        start = self.start if start is None else start
        types = None if self.types is None else self.types.cut(compaction)
        return Frame(start, self.past, compaction.valid, compaction.positions(self.position_ids, policy), lost, types=types)

    @property
    def plain_positions(self) -> Tensor | None:
        """(B or 1, n) position numbers, None where tokens have places in a picture only."""
        if self.position_ids.ndim == 2:
            return self.position_ids
        return self.position_ids[0] if self.position_ids.shape[0] == 4 else None

    def angles(self, language_model: nn.Module, layer: int, hidden: Tensor) -> Any:
        """What the model's rotary module gives a layer of this frame: cos and sin, or one complex tensor (Llama 4).

        Made once per kind of layer.
        """
        kind = angle_kind(language_model, layer)
        if kind not in self._angles:
            places = self.position_ids[1:] if self.position_ids.shape[:-2] == (4,) else self.position_ids
            self._angles[kind] = language_model.rotary_emb(hidden, places, *(() if kind is None else (kind,)))
        made = self._angles[kind]
        return made.to(hidden.device) if isinstance(made, Tensor) else tuple(angle.to(hidden.device) for angle in made)

    def mask(self, config: Any, layer: int, hidden: Tensor, cache: Any) -> Any:
        """What the model itself would hand to this layer as attention mask, made once per kind of layer."""
        kind = layer_kind(config, layer)
        if kind not in self._masks:
            self._masks[kind] = self._make_mask(config, kind, layer, hidden, cache)
        return self._masks[kind]

    def typed_mask(self, config: Any, layer: int, hidden: Tensor, cache: Any) -> Any:
        """The mask of a layer where tokens have types, None where it is causal."""
        return None if self.types is None else self.mask(config, layer, hidden, cache)

    def mask_of_all(self, config: Any, hidden: Tensor, cache: Any) -> Any:
        """What the language model itself is handed: the 2-D mask, or one 4-D mask per kind of layer where tokens have types."""
        if self.maskless:
            return None
        if self.types is None:
            return self.valid.long()
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return self.mask(config, 0, hidden, cache)
        return {kind: self.mask(config, kinds.index(kind), hidden, cache) for kind in set(kinds)}

    def _make_mask(self, config: Any, kind: str, layer: int, hidden: Tensor, cache: Any) -> Any:
        if self.types is not None:
            made = self.types.masks(hidden, self.valid, None if cache is None else LayerView(cache, layer))
            return made[kind] if isinstance(made, dict) else made
        make = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[kind]
        known = inspect.signature(make).parameters
        arguments = {
            "config": config,
            "inputs_embeds" if "inputs_embeds" in known else "input_embeds": hidden,  # renamed in transformers 5
            "attention_mask": None if self.maskless else self.valid,  # a static cache still needs one, for its empty slots
            cache_name(known): None if cache is None else LayerView(cache, layer),
            "position_ids": None,
        }
        if "cache_position" in known and known["cache_position"].default is inspect.Parameter.empty:
            arguments["cache_position"] = self.cache_position()
        return make(**arguments)

    def cache_position(self) -> Tensor:
        """Slots of the fed tokens, for transformers versions that count them."""
        held = self.past.shape[1]
        return torch.arange(held, held + self.fed.shape[1], device=self.fed.device)


@dataclass(frozen=True, eq=False)
class TokenTypes:
    """What each fed token is (B, n), for models that make their masks by that before the language model.

    Args:
        fed: (B, n) token types.
        text: the type of tokens that attend to earlier ones only, as everything held from before does.
        make: the model's own function from tokens and types to masks.
        config: of the whole model.
    """

    fed: Tensor
    text: int
    make: Callable[..., Any]
    config: Any

    def cut(self, compaction: Compaction) -> TokenTypes:
        return replace(self, fed=self.fed.gather(1, compaction.index.to(self.fed.device)))

    def masks(self, hidden: Tensor, valid: Tensor, cache: Any) -> Any:
        """A mask, or one per kind of layer, for the fed tokens over all (B, P + n) slots."""
        past = self.fed.new_full((valid.shape[0], valid.shape[1] - self.fed.shape[1]), self.text)
        return self.make(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=valid,
            position_ids=None,
            token_type_ids=torch.cat([past, self.fed], dim=1),
            is_first_iteration=True,
            **{cache_name(inspect.signature(self.make).parameters): cache},
        )


class LayerView:
    """A cache that answers for one layer whatever layer it is asked about: mask builders ask about the first one."""

    def __init__(self, cache: Any, layer: int) -> None:
        self._cache, self._layer = cache, layer

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self._cache.get_seq_length(self._layer)

    def get_mask_sizes(self, query: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self._cache.get_mask_sizes(query, self._layer)

    def get_query_offset(self, layer_idx: int | None = None) -> Any:
        return self._cache.get_query_offset(self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def uses_flash(config: Any) -> bool:
    """Whether a language model runs on FlashAttention, which reads gaps in position ids as packed sequences."""
    return "flash" in str(config._attn_implementation)


def check_kinds(config: Any, layers: Iterable[int], method: str) -> None:
    """Refuse cuts before layers whose masks cannot be made again."""
    for layer in layers:
        kind = layer_kind(config, layer)
        if not callable(LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(kind)):
            raise UnsupportedError(
                f"{method} cuts inside the language model, but layer {layer} of this {config.model_type} is of kind {kind!r}, whose "
                "mask cannot be made again after a cut; prune before the language model, e.g. with 'fastervlm@64'"
            )


def angle_kind(language_model: nn.Module, layer: int) -> str | None:
    """The kind of a layer where each kind has rotary angles of its own (Gemma3), else None."""
    rotary = getattr(language_model, "rotary_emb", None)  # some hybrids do not rotate at all
    return language_model.config.layer_types[layer] if rotary is not None and _turns_by_kind(type(rotary)) else None


@lru_cache  # every layer asks at every decode step
def _turns_by_kind(rotary: type) -> bool:
    return "layer_type" in inspect.signature(rotary.forward).parameters


def rotary_frequencies(language_model: nn.Module, layer: int) -> Tensor | None:
    """(d / 2,) frequencies of the rotary angles of a layer, None where there are none or they are kept elsewhere."""
    kind = angle_kind(language_model, layer)
    rotary = getattr(language_model, "rotary_emb", None)
    return getattr(rotary, "inv_freq" if kind is None else f"{kind}_inv_freq", None)


def layer_kind(config: Any, layer: int) -> str:
    """ "full_attention" or "sliding_attention", as the model chooses its mask for this layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
