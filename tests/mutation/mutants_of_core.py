# SPDX-License-Identifier: Apache-2.0
"""Mistakes in the core: choice, sequence, cache, session, capture."""

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


# choice -------------------------------------------------------------------------------------------


def lowest_scores(top_k: Function) -> Function:
    return lambda scores, k: top_k(-scores, k)


def descending(top_k: Function) -> Function:
    return lambda scores, k: top_k(scores, k).flip(1)


def shifted_slots(place: Function) -> Function:
    def changed(picture: Any, parts: Any) -> Any:
        cut = place(picture, parts)
        return None if cut is None else replace(cut, keep=cut.keep.roll(1))

    return changed


def patches_only(place: Function) -> Function:
    """Newline and [CLS] columns go with the patches that are cut."""

    def changed(picture: Any, parts: Any) -> Any:
        cut = place(picture, parts)
        if cut is None:
            return None
        patch = torch.zeros_like(cut.keep)
        patch[picture.patches.cpu()] = True
        return replace(cut, keep=cut.keep & patch)

    return changed


def flipped_scores(one: Function) -> Function:
    def changed(picture: Any, name: str, index: Any, crop: int | None) -> Any:
        value = one(picture, name, index, crop)
        per_patch = name not in ("features", "cls_features") and index.shape[0] == picture.count
        return value.flip(0) if per_patch else value

    return changed


def reversed_rows(assign: Function) -> Function:
    return lambda lengths, counts: [row[::-1] for row in assign(lengths, counts)]


def not_placed(replace_rows: Function) -> Function:
    return lambda self, embeds: embeds


CHOICE = (
    Mutant("inverted sort", at.TOP_K, lowest_scores, LLAVA),
    Mutant("unsorted output", at.TOP_K, descending, Pytest("tests/core/test_select.py")),
    Mutant("off by one in the slots", at.PLACE, shifted_slots, LLAVA),
    Mutant("newlines dropped", at.PLACE, patches_only, Checks("fastervlm@9", "llava_next")),
    Mutant("scores of another image", at.SLICE, flipped_scores, Pytest("tests/test_api.py")),
    Mutant("pictures of another row", at.ASSIGN, reversed_rows, Checks("random@9", "llava")),
    Mutant("merged rows not placed", at.REPLACE_ROWS, not_placed, Checks("pool@9", "llava")),
)


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


CACHE = (
    Mutant("cache tells held as seen", at.SEQ_LENGTH, held_for_seen, LLAVA),
    Mutant("detached cache goes on", at.SEQ_LENGTH, any_owner, LLAVA),
    Mutant("reorder forgets the masks", at.REORDER, masks_of_the_first_row, LLAVA),
    Mutant(
        "deep copies of a cache share their groups",
        at.STATE_COPY,
        shared_groups,
        Pytest("tests/core/test_cache.py"),
    ),
)


# session and capture ------------------------------------------------------------------------------


def record_kept(close: Function) -> Function:
    def changed(self: Any, *args: Any) -> None:
        call = self.call
        try:
            close(self, *args)
        finally:
            self._local.call = call

    return changed


def first_hook_kept(detach: Function) -> Function:
    def changed(self: Any) -> None:
        del self._handles[:1]
        detach(self)

    return changed


def wrappers_kept(detach: Function) -> Function:
    def changed(self: Any) -> None:
        self._wrapped.clear()
        detach(self)

    return changed


def nothing(original: Function) -> Function:
    return lambda *args, **options: None


def one_record_for_all(init: Function) -> Function:
    def changed(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        self._local = SimpleNamespace()

    return changed


def made_at_once(keep_mask: Function) -> Function:
    return lambda self, *args, **options: self.original(*args, **options)


def second_query(attend: Function) -> Function:
    def changed(self: Any, reader: Any, queries: Any, keys: Any) -> None:
        attend(self, reader, torch.cat([queries[:, 1:2], queries[:, 1:]], dim=1), keys)

    return changed


def shifted_columns(row_attention: Function) -> Function:
    """The columns of the patches begin with that of [CLS]."""
    return lambda *args: row_attention(*args).roll(1, -1)


def layer_before(block_index: Function) -> Function:
    return lambda layer, count: block_index(layer - 1 if layer < 0 else layer, count)


def whole_map(attend: Function) -> Function:
    def changed(self: Any, reader: Any, queries: Any, keys: Any) -> None:
        queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1)
        attend(self, reader, queries, keys)

    return changed


SESSION = (
    Mutant("state outlives the call", at.CLOSE, record_kept, LLAVA),
    Mutant("hook left behind", at.DETACH, first_hook_kept, LLAVA),
    Mutant("wrapper left behind", at.DETACH, wrappers_kept, LLAVA),
    Mutant("capture left behind", at.CAPTURE_REMOVE, nothing, LLAVA),
    Mutant("one thread's record for all", at.SESSION, one_record_for_all, LLAVA),
    Mutant("2-D mask lost on static caches", at.KEEP_MASK, made_at_once, LLAVA),
    Mutant("wrong query row", at.ATTEND, second_query, Pytest("tests/golden")),
    Mutant("[CLS] column not removed", at.ROW_ATTENTION, shifted_columns, Pytest("tests/golden")),
    Mutant("off-by-one layer", at.BLOCK_INDEX, layer_before, Pytest("tests/golden")),
    Mutant("attention map held", at.ATTEND, whole_map, LLAVA),
)

MUTANTS = (*CHOICE, *SEQUENCE, *CACHE, *SESSION)
