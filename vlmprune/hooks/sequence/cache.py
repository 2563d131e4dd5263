# SPDX-License-Identifier: Apache-2.0
"""The cut KV cache: it tells transformers how many tokens were *seen*, and every layer how many slots are
*held*.

After a cut the cache is shorter than the conversation. Positions, prompt slicing and masks of the next call
all start from ``get_seq_length()``, so a cut cache answers that with the tokens seen, and carries what is
needed to make masks and positions again. It stays the same object (its class becomes a generated subclass),
so that ``isinstance``, ``deepcopy``, beam reordering and cropping keep working.

All layers of a view hold the same slots. The *static part* ends at the last column where some row lost
something; every later column is held by all layers, so cropping rejected draft tokens needs no bookkeeping.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...core.method import Look
from ...errors import InvariantError

if TYPE_CHECKING:
    from transformers import Cache

    from .views import SequenceView
else:
    Cache = object  # the class that is adopted comes behind the mixin


@dataclass(frozen=True, eq=False)
class Marks:
    """What a method keeps of a prompt for one layer.

    Args:
        marked: (B, S) or (B, H, S), marks over the slots that the layer holds: bool, or small numbers.
        visual: (B, S) bool, slots of visual tokens.
        factors: (B, H) of the outputs of its heads.
    """

    marked: Tensor
    visual: Tensor
    factors: Tensor | None = None

    def select(self, rows: Tensor) -> Marks:
        rows = rows.to(self.visual.device)
        factors = None if self.factors is None else self.factors[rows]
        return Marks(self.marked[rows], self.visual[rows], factors)

    def fit(self, width: int) -> Marks:
        """Cut off or fill up with no mark to ``width`` slots."""
        return Marks(_fit(self.marked, width), _fit(self.visual, width), self.factors)


@dataclass(frozen=True, eq=False)
class Note:
    """What a method that repairs keeps of the pictures of a prompt.

    Args:
        vector: (B, r), for rows of the batch.
        there: (B, 1) bool, rows that have a picture.
    """

    vector: Tensor
    there: Tensor

    def select(self, rows: Tensor) -> Note:
        rows = rows.to(self.there.device)
        return Note(self.vector[rows], self.there[rows])


def _fit(mask: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask[..., :width], (0, max(0, width - mask.shape[-1])))


@dataclass
class CacheState:
    """What is attached to a cut cache.

    Args:
        seen: tokens of the conversation that the static part stands for.
        views: of the static part, frozen.
        owner: the session that cut.
        all_valid: every held slot is a token, so that masks may stay None.
        marks: per layer, what the attention and decode slots marked in the prompt.
        notes: per layer that cut, what repairs have to know.
        look: what the decode step before looked at.
        steps: decode steps from which a method hid something, since the prompt.
        stays: (B, L) bool, of a prompt of which the model itself took columns out: those that it left. Masks
            of later calls are of all of them, ``seen`` is not.
        inside: the language model is running, so that lengths are physical.
    """

    seen: int
    views: list[SequenceView]
    owner: weakref.ref
    all_valid: bool
    marks: dict[int, Marks] = field(default_factory=dict)
    notes: dict[int, Note] = field(default_factory=dict)
    look: Look | None = None
    steps: int = 0
    stays: Tensor | None = None
    inside: bool = field(default=False, compare=False)

    def view(self, layer: int) -> SequenceView:
        return next(view for view in reversed(self.views) if view.start <= layer)

    def seen_with(self, cache: Any) -> int | Tensor:
        """Tokens of the conversation so far: those of the static part, and all that came after it."""
        # what came after the static part is held by every layer, so that any layer may count it
        layer = counting_layer(cache)
        return slots_held(cache, layer) + (self.seen - self.view(layer).held.shape[1])

    def require_owner(self) -> None:
        """Raise without the hooks of the session that cut: masks would be made for tokens that are gone."""
        owner = self.owner()
        if owner is None or not owner.attached:
            raise InvariantError(
                "this KV cache was cut by a pruning session that is detached, so it cannot be continued; "
                "keep the session attached for all turns, or start again with an empty cache"
            )

    def select(self, rows: Tensor) -> None:
        """Go on with some rows of the batch, as beam search does."""
        self.views = [view.select(rows) for view in self.views]
        self.marks = {layer: one.select(rows) for layer, one in self.marks.items()}
        self.notes = {layer: one.select(rows) for layer, one in self.notes.items()}
        self.look = None if self.look is None else self.look.select(rows)
        self.stays = None if self.stays is None else self.stays[rows.to(self.stays.device)]

    def __deepcopy__(self, memo: dict) -> CacheState:
        # selecting makes new tensors: the copy must not change with the original
        every = torch.arange(self.views[0].held.shape[0])
        copy = CacheState(
            self.seen,
            self.views,
            self.owner,
            self.all_valid,
            self.marks,
            self.notes,
            self.look,
            self.steps,
            self.stays,
        )
        copy.select(every)
        return copy


class CutCacheMixin(Cache):
    """Overrides that a cut cache needs; mixed into the class of the cache at adoption."""

    _vlmprune_state: CacheState | None

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        held = super().get_seq_length(counting_layer(self) if layer_idx is None else layer_idx)
        state = self._vlmprune_state
        if layer_idx is not None or state is None or state.inside or known(held) == 0:
            return held
        state.require_owner()
        seen: Any = state.seen_with(self)  # a tensor where the cache itself would say a tensor
        return seen

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        # a call that is given its positions does not ask how long the cache is
        state = self._vlmprune_state
        if state is not None and not state.inside:
            state.require_owner()
        return super().update(*args, **kwargs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self._vlmprune_state is not None:
            self._vlmprune_state.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._vlmprune_state is not None:
            batch = self._vlmprune_state.views[0].held.shape[0]
            self._vlmprune_state.select(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self._vlmprune_state is not None:
            self._vlmprune_state.select(indices)

    def crop(self, size: int) -> None:
        """Remove columns from the end; a positive size is the number of tokens left."""
        state = self._vlmprune_state
        if state is None:
            return super().crop(size)
        seen = int(self.get_seq_length())
        remove = -size if size <= 0 else max(seen - size, 0)
        # which rows lost what inside the static part cannot be told any more
        if seen - remove < state.seen:
            raise InvariantError(
                f"cannot crop a pruned cache to {seen - remove} tokens: its first {state.seen} tokens were "
                "cut together; crop only what came after the last image"
            )
        if remove:
            super().crop(-remove)
            state.marks = {
                layer: one.fit(int(self.get_seq_length(layer))) for layer, one in state.marks.items()
            }

    def reset(self) -> None:
        super().reset()
        # an emptied cache is that of a new conversation
        self._vlmprune_state = None


def cache_name(known: Container[str]) -> str:
    """The keyword of a function that takes the KV cache; transformers 5.24 renamed it."""
    return "cache" if "cache" in known else "past_key_values"


def cache_in(values: Mapping[str, Any]) -> Any:
    """The KV cache among keyword arguments or outputs, under either name."""
    found = values.get("cache")
    if found is not None or hasattr(values, "cache"):  # such an output warns of the older name
        return found
    return values.get("past_key_values")


def state_of(cache: Any) -> CacheState | None:
    """What is attached to a cut cache, None for any other; a static cache that was emptied is released."""
    state = getattr(cache, "_vlmprune_state", None)
    if state is not None and known(slots_held(cache)) == 0:
        release(cache)
        return None
    return state


def counting_layer(cache: Any) -> int:
    """The first layer that holds a slot per token; layers with a running state hold none."""
    layers = getattr(cache, "layers", ())
    return next((index for index, layer in enumerate(layers) if hasattr(layer, "get_seq_length")), 0)


def has_running_states(cache: Any) -> bool:
    """Whether some layers keep a state that every token changes, masked or not (Mamba and the like)."""
    layers = getattr(cache, "layers", ())
    # by their attributes: each hybrid has a class of its own for such a layer
    return any(hasattr(layer, "recurrent_states") or hasattr(layer, "conv_states") for layer in layers)


def slots_held(cache: Any, layer: int | None = None) -> int | Tensor:
    """Slots that a layer really holds, by default the first that holds any; a tensor of static caches."""
    if cache is None:
        return 0
    length: int | Tensor = cache.get_seq_length(counting_layer(cache) if layer is None else layer)
    return length


def known(length: int | Tensor) -> int | None:
    """A number of slots or tokens; None where a device would have to be asked, or a graph is being traced."""
    if isinstance(length, Tensor) and (length.device.type != "cpu" or torch.compiler.is_compiling()):
        return None
    return int(length)


def goes_on(cache: Any, new: int) -> bool:
    """Whether a call with ``new`` tokens goes on with a conversation that the cache holds.

    A single token on a static cache always does: asking a device how full it is would wait in every step.
    """
    if not hasattr(cache, "get_seq_length"):  # none, or pages of many requests
        return False
    # the answer of the cache itself: seen tokens where it was cut
    length = cache.get_seq_length()
    held = known(length)
    if held is None:
        return new == 1 or state_of(cache) is not None or bool(length > 0)
    return held > 0


def is_paged(cache: Any) -> bool:
    """Whether this is the cache of continuous batching: pages of many requests at once, without a length."""
    return cache is not None and not hasattr(cache, "get_seq_length")


def adopt(cache: Any, state: CacheState) -> None:
    """Let a cache carry ``state``, turning its class into one that answers by it."""
    # the class is changed and not the object: who holds the cache goes on with it, and copies stay cut
    if not isinstance(cache, CutCacheMixin):
        # mypy takes the __hash__ of its objects for that of the class
        cache.__class__ = _cut_class(type(cache))  # type: ignore[arg-type]
    cache._vlmprune_state = state


@functools.cache  # making a class takes longer than all else that a prompt does to its cache
def _cut_class(cls: type) -> type:
    return type(f"Cut{cls.__name__}", (CutCacheMixin, cls), {"__module__": cls.__module__})


def release(cache: Any) -> None:
    """Give a cache its own class back."""
    if isinstance(cache, CutCacheMixin):
        # the generated class, the mixin, and then the one that was there
        cache.__class__ = type(cache).__mro__[2]
        del cache._vlmprune_state
