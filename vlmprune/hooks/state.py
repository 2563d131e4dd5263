# SPDX-License-Identifier: Apache-2.0
"""ForwardState: the record of one forward of the multimodal model; it dies with it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from ..core.deferred import DeferredChecks
from ..core.report import Report
from ..errors import InvariantError, UnsupportedError
from .sequence.cache import CacheState, Marks, Note, has_running_states
from .sequence.compaction import Compaction
from .sequence.placement import Columns, Placement
from .sequence.views import Views
from .vision.pictures import Picture

if TYPE_CHECKING:
    from .slots.cutting import Cut
    from .slots.spans import InsideRecord

# fields that have no value before the merged sequence is about to enter the language model
_LATER = {
    "given": "input",
    "embeds": "merged sequence",
    "columns": "columns of pictures",
    "tracked": "record of cuts inside the language model",
    "visual_marks": "marks from the vision tower",
    "open_views": "way to open views",
}


@dataclass(eq=False)
class ForwardState:
    """What is known of one forward.

    Args:
        input_ids, inputs_embeds: (B, n) and (B, n, D) as given to the multimodal model, one of them.
        arguments: all that it was given.
        stays: (B, L) bool, where the model itself took columns out of this prompt: those that it left.
        report: what users will read about it.
        given: the one of them that was given.
        new_tokens: n, columns of this forward.
        embeds: (B, n, D) merged embeddings that enter the language model, shorter after a cut before it.
        columns: which columns of the sequence are pictures, in forwards that have any.
        checks: what has to be true of values that are on a device.
        continues: the cache holds earlier tokens of the conversation.
        generated: columns at the end that are no part of the prompt: drafts, or tokens generated without a
            cache.
        pictures: per modality, in the order in which they were encoded; not expanded for beams.
        given_mask, given_types: attention mask and token types as given, for models that make their masks of
            them before the language model.
        entered: the language model was reached.
        cache, cache_state: the KV cache, and what is attached to it where it was cut.
        placements: where the pictures stand, one per modality that has any.
        seen: tokens of the conversation before this forward; None where a device would have to be asked.
        stacked: layers after which features were added to hidden states (DeepStack).
        inside: what cuts inside the language model know; ``tracked`` is the same for cuts that have begun.
        viewed: the layers of this forward have views, which ``open_views`` made.
        entering: the layer that runs and the hidden states (B, n, D) it was given, for the attention slot.
        edited: layers that the attention slot acted on.
        marks: per layer, what is to be attached to the cache; ``held_marks`` are those of earlier forwards.
        visual_marks: (B, L) int8, what a method of the attention slot marked in the tower, in uncut columns.
        notes: per layer that cut, what repairs behind it have to know; ``held_notes`` are those of earlier
            forwards.
        text_heads: per layer (B, H, d) outputs of the heads at the last token of the text alone.
        aside: another prompt runs through the layers, which hooks leave alone.
        picture_cuts: per picture what stays of it before the language model, None where all does.
        active: the session is enabled.
        unpadded: no mask was given, now or earlier in the conversation: every column is a token.
        reads_text: a method chooses by the text before the language model, so that a picture is one of one
            prompt.
        logits: columns at the end whose hidden states are read; 0: all.
        counted: position ids were made by counting tokens: without padding they follow each other.
        reads_held: a slot reads in decode steps what the cache holds.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    report: Report
    checks: DeferredChecks = field(default_factory=DeferredChecks)
    continues: bool = False
    generated: int = 0
    pictures: dict[str, list[Picture]] = field(default_factory=dict)
    given_mask: Any = None
    given_types: Tensor | None = None
    entered: bool = False
    cache: Any = None
    cache_state: CacheState | None = None
    placements: list[Placement] = field(default_factory=list)
    seen: int | None = 0
    stacked: int = 0
    inside: InsideRecord | None = None
    entering: tuple[int, Tensor] | None = None
    edited: set[int] = field(default_factory=set)
    marks: dict[int, Marks] = field(default_factory=dict)
    notes: dict[int, Note] = field(default_factory=dict)
    text_heads: dict[int, Tensor] = field(default_factory=dict)
    aside: bool = False
    picture_cuts: Sequence[Cut | None] = ()
    active: bool = True
    unpadded: bool = False
    reads_text: bool = False
    logits: int = 0
    counted: bool = False
    reads_held: bool = False
    viewed: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict, repr=False)
    stays: Tensor | None = None
    new_tokens: int = field(init=False)
    given: Tensor = field(init=False, repr=False)
    embeds: Tensor = field(init=False, repr=False)
    columns: Columns = field(init=False, repr=False)
    tracked: InsideRecord = field(init=False, repr=False)
    visual_marks: Tensor = field(init=False, repr=False)
    open_views: Callable[[], Views] = field(init=False, repr=False)
    _views: Views | None = None

    def __post_init__(self) -> None:
        given = self.inputs_embeds if self.input_ids is None else self.input_ids
        self.new_tokens = 0 if given is None else given.shape[1]
        if given is not None:
            self.given = given

    if not TYPE_CHECKING:  # or a type checker would let every name pass

        def __getattr__(self, name: str) -> NoReturn:
            """Of what the instance has not: fields that are read too early are named."""
            if name not in _LATER:
                raise AttributeError(name)
            raise InvariantError(
                f"this forward has no {_LATER[name]} yet; expected it to be read where the merged sequence "
                "enters the language model, or later"
            )

    @property
    def views(self) -> Views:
        """The sequence as the decoder layers see it, made when first asked for."""
        if self._views is None:
            self._views, self.viewed = self.open_views(), True
        return self._views

    @property
    def held_marks(self) -> dict[int, Marks]:
        """Per layer, what was marked in earlier forwards of this conversation."""
        return {} if self.cache_state is None else self.cache_state.marks

    @property
    def held_notes(self) -> dict[int, Note]:
        """Per layer that cut, what earlier forwards of this conversation noted for repairs."""
        return {} if self.cache_state is None else self.cache_state.notes

    def kept_patches(self, number: int, picture: Picture) -> Tensor | None:
        """(n,) ascending patches of a picture, by its number in the report, that enter the first layer; None:
        all of them.
        """
        cut = self.picture_cuts[number] if self.picture_cuts else None
        if cut is None:
            return None
        if cut.row_slots is None:
            return cut.keep_idx
        slots = cut.row_slots.sort().values  # a merged row stands for the patch whose place it takes
        if picture.special is None:
            return slots
        number_of = (~picture.special).cumsum(dim=0) - 1
        return number_of.to(slots.device)[slots]

    def text_after_pictures(self) -> Tensor:
        """(B, L) bool, columns after the last picture of each row that has one."""
        return self.columns.after_pictures() & self.columns.with_pictures

    def refuse_dead_slots(self, compaction: Compaction, spec: str) -> None:
        """Raise where a cut would fill up shorter rows in the middle of a conversation and some layers keep a
        running state.

        Such layers cannot skip a dead slot; at the beginning of a conversation their state is empty.
        """
        if compaction.is_even or self.views.at(0).held.shape[1] == 0 or not has_running_states(self.cache):
            return
        if bool((compaction.count != compaction.width).any()):
            raise UnsupportedError(
                f"{spec!r} keeps {compaction.count.tolist()} tokens in the rows of this batch, and layers of "
                "this language model keep a running state that the filling of shorter rows would change in "
                "a later turn; continue the conversations one by one"
            )


class OfThread(threading.local):
    """What a session knows in one thread."""

    # class attributes: what a thread finds that has not run a forward
    state: ForwardState | None = None  # the forward that runs
    opened = False  # whether any forward ran
    unplaced = 0  # how often pictures were encoded that no forward has placed yet
    report: Report | None = None  # of its last prompt; a conversation may go on in a thread that read none
    counts = False  # generate runs and makes the position ids
    drafts = 0  # tokens of the next forward that are drafts
    wants_logits: tuple[Tensor | None, int] | None = None  # what it is given, and how many logits it asks for
    prepared = 0  # decode steps that generate prepared since the last forward that ran outside of a graph
    prompt: tuple[weakref.ref, Tensor] | None = None  # without a cache: what its pictures are of, and it

    def __init__(self) -> None:
        self.checks = DeferredChecks()
