# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the shortened sequence: masks, positions, outputs, the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mutant_targets as at
import torch
from mutant import Checks, Mutant, Pytest

Function = Callable[..., Any]
LLAVA = Checks("fastervlm@9", "llava")


# sequence -----------------------------------------------------------------------------------------


def always(policy: str) -> Function:
    return lambda positions: lambda self, position_ids, _: positions(self, position_ids, policy)


def one_row_before(expand: Function) -> Function:
    return lambda self, rows: expand(self, torch.cat([rows[:, :1], rows[:, :-1]], dim=1))


def tail_of_any_row(tail: Function) -> Function:
    """Columns at the end that any row keeps count as kept by every row."""
    return lambda self: int(self.kept.any(dim=0).flip(0).cumprod(0).sum())


def tail_of_first_row(tail: Function) -> Function:
    """Columns at the end that the first row keeps count as kept by every row."""
    return lambda self: int((self.index[0] - self._columns[: self.width] == self.lost).sum())


def next_row_along(taken: Function) -> Function:
    """What is cut in the launch of the choice is of the columns behind."""

    def changed(self: Any, given: Any) -> Any:
        cut = taken(self, given)
        return cut if cut is None else cut.roll(1, dims=1)

    return changed


def all_new_valid(cut: Function) -> Function:
    def changed(self: Any, *args: Any) -> Any:
        view = cut(self, *args)
        return replace(view, new=torch.ones_like(view.new))

    return changed


def at_the_places_seen(counted_on: Function) -> Function:
    """What was compacted away in earlier calls is not taken off the positions of this one."""
    return lambda self, seen, position_ids, counted: (self.lost, position_ids)


def one_place_behind(take: Function) -> Function:
    return lambda self, seen, position_ids, lost: take(self, seen, position_ids, lost + 1)


def mask_of_what_was_seen(resumed: Function) -> Function:
    """The mask over held slots is the beginning of the mask over all tokens seen."""

    def changed(self: Any, mask: Any, *args: Any) -> Any:
        view = resumed(self, mask, *args)
        return replace(view, held=mask[:, : view.held.shape[1]])

    return changed


def maskless_with_dead_slots(open_views: Function) -> Function:
    """Without a mask given, a decode step makes none, whatever is held."""

    def changed(state: Any, adapter: Any, kwargs: Any) -> Any:
        views = open_views(state, adapter, kwargs)
        if kwargs.get("attention_mask") is None and state.new_tokens == 1 and state.cache_state is not None:
            views.all = [replace(view, maskless=True) for view in views.all]
        return views

    return changed


def output_left_short(leave: Function) -> Function:
    def changed(state: Any, output: Any, owner: Any) -> None:
        short = output.last_hidden_state
        leave(state, output, owner)
        output.last_hidden_state = short

    return changed


def detached_rows(cut_sequence: Function) -> Function:
    def changed(state: Any, *args: Any) -> None:
        cut_sequence(state, *args)
        state.embeds = state.embeds.detach()

    return changed


def types_of_the_first(cut: Function) -> Function:
    return lambda self, compaction: replace(self, new=self.new[:, : compaction.width])


def no_types(token_types: Function) -> Function:
    return lambda state, adapter, new: None


def kind_of_the_last_layer(angle_kind: Function) -> Function:
    return lambda language_model, layer: angle_kind(
        language_model, language_model.config.num_hidden_layers - 1
    )


def lost_in_this_cut_only(cut: Function) -> Function:
    """What earlier calls lost is forgotten by a cut."""

    def changed(self: Any, compaction: Any, policy: str) -> Any:
        view = cut(self, compaction, policy)
        known = policy == "compact" and self.lost is not None
        return replace(view, lost=view.lost - self.lost) if known else view

    return changed


def hidden_states_one_row_off(expand: Function) -> Function:
    """Hidden states between the layers are expanded from the row before; the last ones are right."""

    def changed(self: Any, hidden: Any, layer: int | None = None) -> Any:
        return expand(self, hidden if layer is None else hidden.roll(1, dims=1), layer)

    return changed


def other_features_stacked(stacked: Function) -> Function:
    return lambda self, hidden, visual, embeds: stacked(self, hidden, visual, embeds.flip(0))


def stacked_layers_not_counted(stacked: Function) -> Function:
    def changed(self: Any, hidden: Any, visual: Any, embeds: Any) -> Any:
        self.session.state.stacked = 0
        return stacked(self, hidden, visual, embeds)

    return changed


def every_layer_full(layer_kind: Function) -> Function:
    return lambda config, layer: "full_attention"


def number_for_time(angles: Function) -> Function:
    """Of four axes of positions the first is the number of a token and no place."""

    def changed(self: Any, language_model: Any, layer: int, hidden: Any) -> Any:
        four = self.position_ids.shape[:-2] == (4,)
        one = replace(self, position_ids=self.position_ids[:3]) if four else self
        return angles(one, language_model, layer, hidden)

    return changed


SEQUENCE = (
    Mutant("positions not compacted", at.POSITIONS, always("original"), LLAVA),
    Mutant("positions always compacted", at.POSITIONS, always("compact"), LLAVA),
    Mutant("decode positions forget the cut", at.COUNTED_ON, at_the_places_seen, LLAVA),
    Mutant("positions counted ahead one place behind", at.AHEAD, one_place_behind, LLAVA),
    Mutant("mask left in terms of what was seen", at.VIEW_RESUMED, mask_of_what_was_seen, LLAVA),
    Mutant(
        "mask dropped though dead slots are held",
        at.OPEN_VIEWS,
        maskless_with_dead_slots,
        Pytest("tests/core/test_dead_slots.py"),
    ),
    Mutant("dead slots not masked", at.VIEW_CUT, all_new_valid, LLAVA),
    Mutant(
        "tail of any row for every row",
        at.TAIL,
        tail_of_any_row,
        Pytest("tests/core/test_dead_slots.py"),
    ),
    Mutant(
        "tail of the first row for every row",
        at.EVEN_TAIL,
        tail_of_first_row,
        Pytest("tests/core/test_compaction.py"),
    ),
    Mutant("output not expanded", at.LEAVE, output_left_short, LLAVA),
    Mutant("wrong row expanded", at.EVEN_EXPAND, one_row_before, LLAVA),
    Mutant(
        "wrong row expanded where rows differ",
        at.EXPAND,
        one_row_before,
        Pytest("tests/core/test_compaction.py"),
    ),
    Mutant("other rows copied along", at.EVEN_TAKEN, next_row_along, LLAVA),
    Mutant("gradient cut off", at.CUT_SEQUENCE, detached_rows, LLAVA),
    Mutant(
        "types of other tokens", at.TYPES_CUT, types_of_the_first, Checks("fastervlm(cls=mean)@9", "gemma3")
    ),
    Mutant("causal after a cut", at.TOKEN_TYPES, no_types, Checks("fastervlm(cls=mean)@9", "paligemma")),
    Mutant(
        "earlier turns' losses forgotten",
        at.VIEW_CUT,
        lost_in_this_cut_only,
        Pytest("tests/core/test_turns.py"),
    ),
    Mutant(
        "hidden states of the row before",
        at.VIEWS_EXPAND,
        hidden_states_one_row_off,
        Pytest("tests/core/test_calls.py"),
    ),
    Mutant(
        "hidden states inside of the row before",
        at.VIEWS_EXPAND,
        hidden_states_one_row_off,
        Pytest("tests/core/test_inside.py"),
    ),
    Mutant(
        "stacked features of other tokens", at.STACKED, other_features_stacked, Checks("random@9", "qwen3_vl")
    ),
    Mutant(
        "every stacked layer the first",
        at.STACKED,
        stacked_layers_not_counted,
        Pytest("tests/models/test_families.py"),
    ),
    Mutant(
        "windows ignored after a cut", at.LAYER_KIND, every_layer_full, Pytest("tests/core/test_views.py")
    ),
    Mutant(
        "numbers of tokens read as places",
        at.VIEW_ANGLES,
        number_for_time,
        Checks("fastv(layer=1)@9", "qwen2_vl"),
    ),
    Mutant(
        "angles of another kind of layer",
        at.ANGLE_KIND,
        kind_of_the_last_layer,
        Checks("fastv(layer=1)@9", "gemma3"),
    ),
)


# cache --------------------------------------------------------------------------------------------


def held_for_seen(length: Function) -> Function:
    def changed(self: Any, layer_idx: int | None = None) -> Any:
        length(self, layer_idx)  # which refuses what it has to
        return length(self, 0 if layer_idx is None else layer_idx)

    return changed


def any_owner(require: Function) -> Function:
    return lambda self: None


def masks_of_the_first_row(reorder: Function) -> Function:
    def changed(self: Any, beam_idx: Any) -> None:
        state = self._vlmprune_state
        views = [] if state is None else state.views
        reorder(self, beam_idx)
        if state is not None:
            state.views = [view.select(beam_idx * 0) for view in views]

    return changed


def shared_views(deepcopy: Function) -> Function:
    return lambda self, memo: replace(deepcopy(self, memo), views=self.views)


def views_only(select: Function) -> Function:
    def changed(self: Any, rows: Any) -> None:
        marks = self.marks
        select(self, rows)
        self.marks = marks

    return changed


def marks_not_cropped(crop: Function) -> Function:
    def changed(self: Any, size: int) -> None:
        marks = self._vlmprune_state.marks
        crop(self, size)
        self._vlmprune_state.marks = marks

    return changed


def emptied_but_still_cut(state_of: Function) -> Function:
    return lambda cache: getattr(cache, "_vlmprune_state", None)


def asked(known: Function) -> Function:
    return lambda length: int(length)


CACHE = (
    Mutant("cache tells held as seen", at.SEQ_LENGTH, held_for_seen, LLAVA),
    Mutant("detached cache goes on", at.REQUIRE_OWNER, any_owner, LLAVA),
    Mutant("reorder forgets the masks", at.REORDER, masks_of_the_first_row, LLAVA),
    Mutant("marks stay when rows move", at.CACHE_SELECT, views_only, Pytest("tests/core/test_cache.py")),
    Mutant(
        "marks longer than a cropped cache", at.CROP, marks_not_cropped, Pytest("tests/core/test_cache.py")
    ),
    Mutant(
        "an emptied static cache still cut",
        at.STATE_OF,
        emptied_but_still_cut,
        Pytest("tests/core/test_cache.py"),
    ),
    Mutant(
        "a static cache is asked how full it is",
        at.KNOWN,
        asked,
        Pytest("tests/core/test_static_steps.py"),
    ),
    Mutant(
        "deep copies of a cache share their views",
        at.STATE_COPY,
        shared_views,
        Pytest("tests/core/test_cache.py"),
    ),
)

MUTANTS = (*SEQUENCE, *CACHE)
