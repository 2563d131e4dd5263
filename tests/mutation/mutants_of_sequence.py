# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the shortened sequence: masks, positions, outputs, the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
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


def tail_of_any_row(init: Function) -> Function:
    """Columns at the end that any row keeps count as kept by every row."""

    def changed(self: Any, keep: Any, valid: Any) -> None:
        init(self, keep, valid)
        self.tail = int((keep & valid).any(dim=0).flip(0).cumprod(0).sum())

    return changed


def all_fed_valid(cut: Function) -> Function:
    def changed(self: Any, *args: Any, **options: Any) -> Any:
        frame = cut(self, *args, **options)
        return replace(frame, fed=torch.ones_like(frame.fed))

    return changed


def at_the_places_seen(frames: Function) -> Function:
    """What was compacted away in earlier calls is not taken off the positions of this one."""

    def changed(self: Any, call: Any, kwargs: Any, state: Any, embeds: Any) -> Any:
        found = frames(self, call, kwargs, state, embeds)
        return [replace(one, position_ids=one.position_ids + one.lost[:, None]) for one in found]

    return changed


def mask_of_what_was_seen(frames: Function) -> Function:
    """The mask over held slots is the beginning of the mask over all tokens seen."""

    def changed(self: Any, call: Any, kwargs: Any, state: Any, embeds: Any) -> Any:
        found = frames(self, call, kwargs, state, embeds)
        mask = kwargs.get("attention_mask")
        if state is None or mask is None:
            return found
        return [replace(one, past=mask[:, : one.past.shape[1]].bool()) for one in found]

    return changed


def maskless_with_dead_slots(frames: Function) -> Function:
    """Without a mask given, a decode step makes none, whatever is held."""

    def changed(self: Any, call: Any, kwargs: Any, state: Any, embeds: Any) -> Any:
        found = frames(self, call, kwargs, state, embeds)
        bare = kwargs.get("attention_mask") is None and embeds.shape[1] == 1 and state is not None
        return [replace(one, maskless=True) for one in found] if bare else found

    return changed


def output_left_short(leave: Function) -> Function:
    def changed(self: Any, call: Any, output: Any) -> Any:
        short = output.last_hidden_state
        found = leave(self, call, output)
        found.last_hidden_state = short
        return found

    return changed


def detached_rows(cut: Function) -> Function:
    return lambda self, call, embeds: cut(self, call, embeds).detach()


def types_of_the_first(cut: Function) -> Function:
    return lambda self, compaction: replace(self, fed=self.fed[:, : compaction.width])


def no_types(types: Function) -> Function:
    return lambda self, call, fed: None


def kind_of_the_last_layer(angle_kind: Function) -> Function:
    return lambda language_model, layer: angle_kind(
        language_model, language_model.config.num_hidden_layers - 1
    )


def lost_in_this_cut_only(cut: Function) -> Function:
    """What earlier calls lost is forgotten by a cut."""

    def changed(self: Any, compaction: Any, policy: str, *rest: Any) -> Any:
        frame = cut(self, compaction, policy, *rest)
        return replace(frame, lost=frame.lost - self.lost) if policy == "compact" else frame

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
        self.session.call.stacked = 0
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
    Mutant("decode positions forget the cut", at.SEEN_FRAMES, at_the_places_seen, LLAVA),
    Mutant("mask left in the seen frame", at.SEEN_FRAMES, mask_of_what_was_seen, LLAVA),
    Mutant(
        "mask dropped though dead slots are held",
        at.SEEN_FRAMES,
        maskless_with_dead_slots,
        Pytest("tests/core/test_dead_slots.py"),
    ),
    Mutant("dead slots not masked", at.FRAME_CUT, all_fed_valid, LLAVA),
    Mutant(
        "tail of any row for every row",
        at.COMPACTION,
        tail_of_any_row,
        Pytest("tests/core/test_dead_slots.py"),
    ),
    Mutant("output not expanded", at.LEAVE, output_left_short, LLAVA),
    Mutant("wrong row expanded", at.EXPAND, one_row_before, LLAVA),
    Mutant("gradient cut off", at.CUT, detached_rows, LLAVA),
    Mutant(
        "types of other tokens", at.TYPES_CUT, types_of_the_first, Checks("fastervlm(cls=mean)@9", "gemma3")
    ),
    Mutant("causal after a cut", at.TOKEN_TYPES, no_types, Checks("fastervlm(cls=mean)@9", "paligemma")),
    Mutant(
        "earlier turns' losses forgotten",
        at.FRAME_CUT,
        lost_in_this_cut_only,
        Pytest("tests/core/test_turns.py"),
    ),
    Mutant(
        "hidden states of the row before",
        at.CALL_EXPAND,
        hidden_states_one_row_off,
        Pytest("tests/core/test_calls.py"),
    ),
    Mutant(
        "hidden states inside of the row before",
        at.CALL_EXPAND,
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
        "windows ignored after a cut", at.LAYER_KIND, every_layer_full, Pytest("tests/core/test_frames.py")
    ),
    Mutant(
        "numbers of tokens read as places",
        at.FRAME_ANGLES,
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


def any_owner(length: Function) -> Function:
    def changed(self: Any, layer_idx: int | None = None) -> Any:
        state = self._vlmprune_state
        if state is None:
            return length(self, layer_idx)
        owner, state.owner = state.owner, lambda: SimpleNamespace(attached=True)
        try:
            return length(self, layer_idx)
        finally:
            state.owner = owner

    return changed


def masks_of_the_first_row(reorder: Function) -> Function:
    def changed(self: Any, beam_idx: Any) -> None:
        state = self._vlmprune_state
        groups = [] if state is None else state.groups
        reorder(self, beam_idx)
        if state is not None:
            state.groups = [group.select(beam_idx * 0) for group in groups]

    return changed


def shared_groups(deepcopy: Function) -> Function:
    def changed(self: Any, memo: dict) -> Any:
        return replace(deepcopy(self, memo), groups=self.groups)

    return changed


def groups_only(rows: Function) -> Function:
    def changed(self: Any, order: Any) -> None:
        state = self._vlmprune_state
        marks = None if state is None else state.marks
        rows(self, order)
        if state is not None:
            state.marks = marks

    return changed


def marks_not_cropped(crop: Function) -> Function:
    def changed(self: Any, size: int) -> None:
        marks = self._vlmprune_state.marks
        crop(self, size)
        self._vlmprune_state.marks = marks

    return changed


def emptied_but_still_cut(state_of: Function) -> Function:
    return lambda cache: getattr(cache, "_vlmprune_state", None)


CACHE = (
    Mutant("cache tells held as seen", at.SEQ_LENGTH, held_for_seen, LLAVA),
    Mutant("detached cache goes on", at.SEQ_LENGTH, any_owner, LLAVA),
    Mutant("reorder forgets the masks", at.REORDER, masks_of_the_first_row, LLAVA),
    Mutant("marks stay when rows move", at.CACHE_ROWS, groups_only, Pytest("tests/core/test_cache.py")),
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
        "deep copies of a cache share their groups",
        at.STATE_COPY,
        shared_groups,
        Pytest("tests/core/test_cache.py"),
    ),
)

MUTANTS = (*SEQUENCE, *CACHE)
