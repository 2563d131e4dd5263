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
_OF_VIEWS = ("hidden_states", "attention_mask", "position_ids", "position_embeddings", "cache_position")


def check_aligned(adapter: Adapter, method: str) -> None:
    """Refuse cuts before layers that are given something of every token under a name that nobody said."""
    if adapter.aligned and not adapter.beside:
        raise UnsupportedError(
            f"{method} cuts inside the language model, whose layers are given {list(adapter.aligned)} of "
            "every token beside it, which would not follow the cut; prune before the language model, e.g. "
            "with 'divprune@64'"
        )


def follow_beside(
    views: Views, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any], names: tuple[str, ...]
) -> tuple[tuple, dict[str, Any]]:
    """Arguments of a layer with ``names`` (B or 1, L, ...) after the cuts in front of it: (B, n, ...)."""
    cuts = [compaction for start, compaction in views.cuts if 0 < start <= index]
    if not cuts:
        return args, kwargs
    kind: type[Any] = type(layer)
    known = list(parameters_of(kind.forward))[1:]  # without self
    batch, length = cuts[0].index.shape[0], cuts[0].length

    def followed(name: str, value: Any) -> Any:
        tensor = isinstance(value, Tensor) and name not in _OF_VIEWS
        along = tensor and value.ndim >= 2 and value.shape[1] == length and value.shape[0] in (1, batch)
        # every one that is named must run along the tokens, and every one that does must be named
        if tensor and along != (name in names):
            raise UnsupportedError(
                f"{kind.__name__} is given {name!r} of shape {tuple(value.shape)} behind a cut inside the "
                f"language model; expected something of each of {length} tokens under the names "
                f"{list(names)} alone, which the adapter says in `beside`; correct it there, or prune before "
                "the language model, e.g. with 'divprune@64'"
            )
        if along:
            for compaction in cuts:
                value = compaction.along(value)
        return value

    # a wrapper that takes anything says no names
    places = [*known[: len(args)], *(f"argument {place}" for place in range(len(known), len(args)))]
    moved = tuple(followed(name, value) for name, value in zip(places, args, strict=True))
    # a layer hands on what it does not know, and its attention function reads none of that
    own = {name: followed(name, value) for name, value in kwargs.items() if name in (*known, *names)}
    return moved, kwargs | own
