# SPDX-License-Identifier: Apache-2.0
"""Masks and rotary angles of one unpadded sample written out by hand, for the slow twins."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def blocks_of(family: str, types: Tensor) -> Tensor:
    """Token types (n,) as numbers of blocks, -1 for none: PaliGemma's prompt (0) is one, each image (a run of
    1) of Gemma 3.
    """
    if family == "paligemma":
        return torch.where(types == 0, 0, -1)
    number, found = -1, []
    for i, kind in enumerate(types.tolist()):
        number += kind == 1 and (i == 0 or int(types[i - 1]) != 1)
        found.append(number if kind == 1 else -1)
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
    seen = at[None, :] <= at[:, None]
    near = at[None, :] > at[:, None] - text.sliding_window if slides(text, layer) else torch.ones_like(seen)
    both = torch.zeros_like(seen)
    if blocks is not None:
        both = (blocks[:, None] == blocks[None, :]) & (blocks >= 0)
    # the window of Gemma 3 bounds what a block sees, that of PaliGemma 2 does not
    seen = (seen | both) & near if config.model_type == "gemma3" else (seen & near) | both
    return torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)


def angles_by_hand(
    language_model: Any, layer: int, hidden: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Rotary cos and sin of a decoder layer, whose kind has its own in Gemma 3."""
    rotary = language_model.rotary_emb
    own = "layer_type" in inspect.signature(rotary.forward).parameters
    return rotary(hidden, positions, *([language_model.config.layer_types[layer]] if own else []))


def frequencies(language_model: Any, layer: int) -> Tensor:
    """(d / 2,) frequencies of those angles."""
    rotary = language_model.rotary_emb
    if hasattr(rotary, "inv_freq"):
        return rotary.inv_freq
    return getattr(rotary, f"{language_model.config.layer_types[layer]}_inv_freq")
