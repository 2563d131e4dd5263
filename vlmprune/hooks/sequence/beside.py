# SPDX-License-Identifier: Apache-2.0
"""What decoder layers are given of every token beside its hidden state, behind cuts between them.

The model makes it once for the uncut sequence: embeddings per layer (Gemma 4), types that choose experts
(ERNIE 4.5). An adapter names what its layers call it; what nobody named is refused, since it would speak of
other tokens than those that are left.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedError
from ..adapter import Adapter
from .masks import parameters_of
from .views import Views

# made anew for every view
_OF_VIEWS = ("attention_mask", "position_ids", "position_embeddings", "cache_position")


def check_aligned(adapter: Adapter, method: str) -> None:
    """Refuse cuts before layers that are given something of every token under a name that nobody said."""
    if adapter.aligned and not adapter.beside:
        raise UnsupportedError(
            f"{method} cuts inside the language model, whose layers are given {list(adapter.aligned)} of "
            "every token beside it, which would not follow the cut; prune before the language model, e.g. "
            "with 'divprune@64'"
        )


def follow_beside(
    views: Views, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], adapter: Adapter
) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a layer with what runs along the tokens (B or 1, L, ...) after the cuts in front of it."""
    if not views.cuts:  # a decode step, for one
        return args, kwargs
    kind: type[Any] = type(layer)
    known = list(parameters_of(kind.forward))[2:]  # without self and hidden states
    beside, kwargs, names = list(args[1:]), dict(kwargs), adapter.beside
    given: list[tuple[Any, Any, str]] = []  # where it is held, and what the layer calls it
    for place in range(len(beside)):
        given.append((beside, place, known[place] if place < len(known) else f"argument {place + 1}"))
    for name in known:  # what else it is given it hands on, and its attention function reads none of that
        if name in kwargs:
            given.append((kwargs, name, name))
    for start, compaction in views.cuts:
        if not 0 < start <= index:  # what the language model is given has followed those in front of it
            continue
        batch, length = compaction.index.shape[0], compaction.length
        for held, place, name in given:
            value = held[place]
            if not isinstance(value, Tensor) or name in _OF_VIEWS:
                continue
            along = value.ndim >= 2 and value.shape[1] == length and value.shape[0] in (1, batch)
            # every one that is named must run along the tokens, and every one that does must be named
            if along != (name in names):
                raise UnsupportedError(
                    f"{kind.__name__} is given {name!r} of shape {tuple(value.shape)} behind a cut inside "
                    f"the language model; expected something of each of {length} tokens under the names "
                    f"{list(names)} alone, which the adapter says in `beside`; correct it there, or prune "
                    "before the language model, e.g. with 'divprune@64'"
                )
            if along:
                held[place] = compaction.along(value)
    return (*args[:1], *beside), kwargs
