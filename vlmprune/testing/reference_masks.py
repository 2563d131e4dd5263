# SPDX-License-Identifier: Apache-2.0
"""Masks and rotary angles of one unpadded sample written out by hand, for the slow twins."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def attends_both_ways(config: Any) -> bool:
    """Whether some tokens of a model attend to later ones, by their types."""
    if config.model_type == "gemma4":
        return config.text_config.use_bidirectional_attention == "vision"
    return config.model_type in ("paligemma", "gemma3", "shieldgemma2", "molmo2")


def blocks_of(family: str, types: Tensor) -> Tensor:
    """Token types (n,) as numbers of blocks, -1 for none: PaliGemma's prompt (0) is one, all pictures (1) of
    Molmo 2 are one, each picture (a run of other types) of Gemma 3 and 4.
    """
    if family in ("paligemma", "molmo2"):
        return torch.where(types == (family == "molmo2"), 0, -1)
    number, found = -1, []
    for i, kind in enumerate(types.tolist()):
        # a block begins where the type before is 0, or at the start
        number += kind > 0 and (i == 0 or int(types[i - 1]) == 0)
        found.append(number if kind > 0 else -1)
    return torch.tensor(found)


def slides(text_config: Any, layer: int) -> bool:
    """Whether a layer attends to a sliding window."""
    kinds = getattr(text_config, "layer_types", None)
    return (
        getattr(text_config, "sliding_window", None) is not None
        if kinds is None
        else kinds[layer] == "sliding_attention"
    )


def any_window(model: Any, length: int) -> bool:
    """Whether some decoder layer has a window that is narrower than a sequence."""
    text = model.config.get_text_config()
    return any(
        slides(text, layer) and text.sliding_window < length for layer in range(text.num_hidden_layers)
    )


def mask_by_hand(config: Any, layer: int, length: int, blocks: Tensor | None = None) -> Tensor:
    """(1, 1, n, n) additive mask of a decoder layer: causal, inside its window, and both ways inside
    blocks."""
    text, at = config.get_text_config(), torch.arange(length)
    seen = at[None, :] <= at[:, None]  # (n, n), causal
    # the window counts the own column
    near = at[None, :] > at[:, None] - text.sliding_window if slides(text, layer) else torch.ones_like(seen)
    both = torch.zeros_like(seen)
    if blocks is not None:
        both = (blocks[:, None] == blocks[None, :]) & (blocks >= 0)
    if config.model_type == "gemma4" and not slides(text, layer):  # both ways in layers with a window only
        both = torch.zeros_like(seen)
    # the window of PaliGemma 2 alone does not bound what a block sees
    seen = (seen & near) | both if config.model_type == "paligemma" else (seen | both) & near
    return torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)


def angles_by_hand(
    language_model: Any, layer: int, hidden: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Rotary cos and sin of a decoder layer, whose kind may have its own (Gemma 3), or none (LFM3)."""
    rotary = language_model.rotary_emb
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return rotary(hidden, positions)
    kind = language_model.config.layer_types[layer]
    return rotary(hidden, positions, kind) if hasattr(rotary, f"{kind}_inv_freq") else None


def frequencies(language_model: Any, layer: int) -> Tensor:
    """(d / 2,) frequencies of those angles."""
    rotary = language_model.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return rotary.inv_freq
    return getattr(rotary, f"{language_model.config.layer_types[layer]}_inv_freq")
