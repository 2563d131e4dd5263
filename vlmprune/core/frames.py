# SPDX-License-Identifier: Apache-2.0
"""Frames: how a group of decoder layers sees the sequence: slots held, validity, positions, and the masks made from them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

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
    """

    start: int
    past: Tensor
    fed: Tensor
    position_ids: Tensor
    lost: Tensor
    maskless: bool = False
    _masks: dict[str, Any] = field(default_factory=dict)
    _angles: tuple[Tensor, Tensor] | None = None

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
        return Frame(start, self.past, compaction.valid, compaction.positions(self.position_ids, policy), lost)

    def angles(self, language_model: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin of this frame, made once."""
        if self._angles is None:
            places = self.position_ids[1:] if self.position_ids.shape[:-2] == (4,) else self.position_ids
            self._angles = language_model.rotary_emb(hidden, places)
        return self._angles

    def mask(self, config: Any, layer: int, hidden: Tensor, cache: Any) -> Any:
        """What the model itself would hand to this layer as attention mask, made once per kind of layer."""
        kind = layer_kind(config, layer)
        if kind not in self._masks:
            self._masks[kind] = self._make_mask(config, kind, layer, hidden, cache)
        return self._masks[kind]

    def _make_mask(self, config: Any, kind: str, layer: int, hidden: Tensor, cache: Any) -> Any:
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


def layer_kind(config: Any, layer: int) -> str:
    """ "full_attention" or "sliding_attention", as the model chooses its mask for this layer."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
