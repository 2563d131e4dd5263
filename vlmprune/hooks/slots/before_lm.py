# SPDX-License-Identifier: Apache-2.0
"""The slot before the language model: from the pictures of a forward and one method to the columns that stay.

This is the only place that knows how a choice of tokens becomes a cut of the prompt: newline and [CLS] slots
stay, kept patches keep their own slot, and rows of merging methods take over the slots they stand for.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...core.budget import Budget
from ...core.deferred import NOW, Checks
from ...core.merged import Merged, names_of, through
from ...core.method import Method, Need, needs_of
from ...core.select import choose, choose_own
from ...errors import InvariantError, UnsupportedError
from ...kernels import dispatch
from ..sequence.text import with_text
from ..state import ForwardState
from ..vision.pictures import Picture, Unit, make_units, stack_units
from ..vision.tiles import Tiles, choose_in_tiles
from . import Attachment, Handle
from .cutting import Cut, cut_sequence, joined, listed

Projector = Callable[[Tensor], Tensor]


class BeforeLM:
    """Cuts the merged sequence before the first decoder layer."""

    in_tower: ClassVar[bool] = False

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.method, self.budget = attachment, method, budget
        # asked once: both are properties of some methods, and a forward asks many times
        self.needs, self.policy = needs_of(method), attachment.policy(method)

    def hooks(self) -> list[Handle]:
        return []

    def missed(self, state: ForwardState) -> set[int]:
        return set()

    def enter(self, state: ForwardState) -> None:
        if not state.placements:
            return
        started = time.perf_counter()
        pictures, samples = listed(state)
        if state.reads_text:
            pictures = with_text(state, self.attachment.adapter, pictures, self.needs)
        cuts = cut_pictures(
            pictures,
            samples,
            self.method,
            self.budget,
            self.attachment.adapter.projector,
            needs=self.needs,
            strict=self.attachment.strict,
            checks=state.checks,
            in_place=self.policy == "original",
            frames=self.attachment.frames,
        )
        cut_sequence(state, cuts, self.policy, self.attachment.spec)
        if any([cut is not None for cut in cuts]):
            state.report.seconds += time.perf_counter() - started


def cut_pictures(
    pictures: Sequence[Picture],
    samples: Sequence[Sequence[int]],
    method: Method,
    budget: Budget | None,
    projector: Projector | None,
    *,
    needs: Sequence[Need],
    strict: bool = False,
    checks: Checks = NOW,
    in_place: bool = False,
    frames: bool = False,
) -> list[Cut | None]:
    """One Cut per picture, None where it stays whole. ``samples`` lists the pictures of each prompt.

    Args:
        in_place: rows of merging methods stand in the slots of their tokens, because what a slot has beside
            its row (its position, features added later) stays; otherwise in the order of the method.
        frames: the images of a prompt are frames of one clip: a budget is spent on all of them, and one per
            crop on each.
    """
    if budget is None and method.counts == "budget":
        return [None] * len(pictures)
    # tiles that are laid out anew spend their own budget, and take no part in units
    spatial = {
        p: picture.tiles
        for p, picture in enumerate(pictures)
        if method.layout == "spatial" and picture.tiles is not None
    }
    cuts: list[Cut | None] = [None] * len(pictures)
    for p, tiles in spatial.items():
        cuts[p] = _cut_tiles(pictures[p], tiles, method, budget, projector, checks)
    scope: str = "image" if budget is None else budget.scope
    if frames:
        scope = "image" if scope == "crop" else "clip"
    units = make_units(pictures, [[p for p in sample if p not in spatial] for sample in samples], scope)
    chosen = choose_units(
        units, pictures, method, budget, projector, needs=needs, strict=strict, checks=checks
    )
    by_picture: dict[int, list[Choice]] = defaultdict(list)
    for unit, choice in zip(units, chosen, strict=True):
        if len(unit.members) > 1:
            for p, part in split_by_picture(unit, choice, pictures, method):
                by_picture[p].append(part)
            continue
        p, choice.patches = unit.members[0]
        by_picture[p].append(choice)
    for p, parts in by_picture.items():
        nothing = all([part.index is not None and not len(part.index) for part in parts])
        if nothing and budget is None and not frames:
            # newline and [CLS] slots go as well: they tell of the picture, and part nothing any more
            none = torch.empty(0, dtype=torch.int64, device=pictures[p].features.device)
            cuts[p] = Cut(none, none, pictures[p].grids, pictures[p].length)
        else:
            cuts[p] = to_slots(pictures[p], parts, in_place)
    return cuts


@dataclass(eq=False)
class Choice:
    """What was chosen of the tokens of one unit that lie in one picture.

    Args:
        patches: (n,) indices in the picture of these tokens, None for all patches of the picture.
        index: (k,) tokens among them that stay, ascending; -1 for rows of a merging method without a place.
            None: all.
        rows: (k, D) of merging methods.
        joins: of merging methods that say it: gives (N,) or (N, J) int64, for each token of the unit the rows
            that it became part of, by the names of ``core.merged.names_of``, -1 for none.
    """

    patches: Tensor | None
    index: Tensor | None
    rows: Tensor | None = None
    joins: Callable[[], Tensor] | None = None


def choose_units(
    units: Sequence[Unit],
    pictures: Sequence[Picture],
    method: Method,
    budget: Budget | None,
    projector: Projector | None,
    *,
    needs: Sequence[Need],
    strict: bool,
    checks: Checks,
) -> list[Choice]:
    """What the method keeps of every unit; units of the same shape are asked for together.

    Without a budget the method says itself how many tokens stay.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, unit in enumerate(units):
        if strict and budget and isinstance(budget.keep, int) and budget.keep > unit.count:
            raise InvariantError(
                f"strict: keep={budget.keep} tokens but unit {number} holds {unit.count}; lower keep or drop "
                "strict"
            )
        method.check_unit(unit.count)
        crops = sum(1 if unit.crop is not None else pictures[p].cls_count for p, _ in unit.members)
        # texts of different length are not filled up: a row is chosen for in a batch as it is alone
        words = pictures[unit.members[0][0]].word_counts
        groups[(unit.count, unit.grids, crops, words)].append(number)
    # what no method is asked for stays whole
    chosen = [Choice(None, None) for _ in units]
    for (count, *_), numbers in groups.items():
        if budget is not None and budget.count(count) >= count:
            continue  # keep = all is dense for every method, merging ones included
        tokens = stack_units([units[n] for n in numbers], pictures, needs, projector, checks)
        rows: Sequence[Tensor | Merged]
        if budget is None:
            rows = choose_own(method, tokens, checks)
        else:
            answer = choose(method, tokens, budget.count(count), checks)
            every = range(len(numbers))
            rows = list(answer) if isinstance(answer, Tensor) else [answer.unit(one) for one in every]
        for number, one in zip(numbers, rows, strict=True):
            if isinstance(one, Merged):
                chosen[number] = Choice(None, one.slots, one.features, places_of(one))
            else:
                chosen[number] = Choice(None, one)
    return chosen


def places_of(rows: Merged) -> Callable[[], Tensor] | None:
    """``Choice.joins`` of one unit, from rows numbered in the order of the method."""
    ask, slots = rows.joins, rows.slots
    return None if ask is None else lambda: through(ask(), names_of(slots))


def part_of(joins: Callable[[], Tensor] | None, start: int, end: int) -> Callable[[], Tensor] | None:
    """The same of the tokens ``start`` to ``end - 1`` of a unit, whose numbers stay those of the unit."""
    return None if joins is None else lambda: joins()[start:end]


def split_by_picture(
    unit: Unit, choice: Choice, pictures: Sequence[Picture], method: Method
) -> list[tuple[int, Choice]]:
    """The choice of a unit of several pictures, told apart by picture."""
    if choice.rows is not None and not unit.frames:
        raise UnsupportedError(
            f"{method.name} merges tokens and cannot spread one budget over several images: use scope image "
            "or crop"
        )
    index, rows = choice.index, choice.rows
    if index is not None and rows is not None and bool((index < 0).any()):
        raise UnsupportedError(
            f"{method.name} makes rows that stand for no single token, so that no image can hold them; with "
            f"frames=True use a budget for each frame, as in '{method.name}@16/crop', or another method"
        )
    parts, start = [], 0
    for p, _ in unit.members:  # whole pictures, one after the other
        end = start + pictures[p].count
        if index is None:
            parts.append((p, Choice(None, None)))
        else:
            here = (index >= start) & (index < end)
            own_rows = None if rows is None else rows[here]
            parts.append((p, Choice(None, index[here] - start, own_rows, part_of(choice.joins, start, end))))
        start = end
    return parts


def to_slots(picture: Picture, parts: Sequence[Choice], in_place: bool = False) -> Cut | None:
    """Turn the choices inside one picture into slots."""
    if all([part.index is None for part in parts]):
        return None
    kept: list[Tensor] = []  # patches that stay, -1 for rows without a place
    for part in parts:
        if part.index is None:
            kept.append(torch.arange(picture.count) if part.patches is None else part.patches)
        elif part.patches is None:
            kept.append(part.index)
        else:
            own = part.patches.to(part.index.device)
            kept.append(torch.where(part.index < 0, -1, own[part.index.clamp_min(0)]))
    device = picture.features.device
    keep_idx = kept[0] if len(kept) == 1 else torch.cat([one.to(device) for one in kept])
    if any([part.rows is not None for part in parts]):
        return _to_rows(picture, parts, keep_idx, in_place)
    return Cut.of(picture, keep_idx if len(kept) == 1 else keep_idx.sort().values)


def _to_rows(picture: Picture, parts: Sequence[Choice], keep_idx: Tensor, in_place: bool) -> Cut:
    """Slots and rows of a merging method; a unit that is kept whole beside merged ones counts as rows too."""
    slots, rows = [], []
    listed_in_order = len(parts) == 1 and picture.unbroken and not in_place
    for part in parts:
        own = torch.arange(picture.count) if part.patches is None else part.patches
        if part.rows is None or part.index is None:  # rows always come with an index
            patches = own if part.index is None else own.to(part.index.device)[part.index]
            slots.append(picture.slots_of(patches))
            rows.append(picture.patch_features(patches))
            continue
        if listed_in_order:
            slots.append(all_hosts(picture.count, part.index))
        else:
            slots.append(hosts_of(picture.slots_of(own.to(part.index.device)), part.index))  # (k,)
        rows.append(part.rows)
    device = rows[0].device
    every = joined([one.to(device) for one in slots])
    merged = joined([one.to(device, rows[0].dtype) for one in rows])
    kept = every if picture.special is None else torch.cat([every, picture.specials.to(device)])
    joins = whole_joins(picture.count, parts)
    return Cut(kept, keep_idx, picture.grids, picture.length, every, merged, joins)


def whole_joins(count: int, parts: Sequence[Choice]) -> Callable[[], Tensor] | None:
    """``Cut.joins`` of a picture of ``count`` patches, from those of its parts, each of which counts its own
    tokens, and its rows without a place; None where one of them does not say it.
    """
    asked = [part.joins for part in parts]
    if len(parts) == 1 and parts[0].patches is None:
        return asked[0]
    if any(ask is None and part.rows is not None for ask, part in zip(asked, parts, strict=True)):
        return None

    def joins() -> Tensor:
        found = [_joins_in(count, part) for part in parts]
        whole = torch.full((count, max(one.shape[1] for _, one, _ in found)), -1)
        placeless = 0
        for own, one, placeless_here in found:
            whole[own, : one.shape[1]] = torch.where(one < -1, one - placeless, one)
            placeless += placeless_here
        return whole[:, 0] if whole.shape[1] == 1 else whole

    return joins


def _joins_in(count: int, part: Choice) -> tuple[Tensor, Tensor, int]:
    """Of a part of a picture, on the CPU: its patches (n,), the rows (n, J) that each is part of, and the
    number of its rows without a place.
    """
    own = torch.arange(count) if part.patches is None else part.patches.cpu()
    if part.joins is not None and part.index is not None:
        names = part.joins().cpu()
        rows = torch.where(names < 0, names, own[names.clamp_min(0)])
        return own, rows if rows.ndim > 1 else rows[:, None], int((part.index < 0).sum())
    # nothing was merged: what stays is a row of its own
    left = own if part.index is None else own[part.index.cpu()]
    return own, torch.where(torch.isin(own, left), own, -1)[:, None], 0


def hosts_of(slots: Tensor, index: Tensor) -> Tensor:
    """The slot (k,) that each row takes: its token's own, or for rows without a token the lowest free ones in
    order.

    Args:
        slots: (n,) of the tokens of a unit.
        index: (k,) token of every row, -1 for a row without one.
    """
    placeless = index < 0
    taken = torch.zeros(slots.shape[0] + 1, dtype=torch.int8, device=index.device)
    taken[torch.where(placeless, slots.shape[0], index)] = 1  # the last entry takes the rows without a token
    free = taken[:-1].argsort(stable=True)  # free ones first, ascending
    number = (placeless.cumsum(dim=0) - 1).clamp_min(0)
    return slots[torch.where(placeless, free[number], index.clamp_min(0))]


def all_hosts(count: int, index: Tensor) -> Tensor:
    """(k,) the same slots, ascending, where all ``count`` tokens of a picture are one unit."""
    if not index.shape[0]:
        return index  # of a frame that no row stands for
    return dispatch.host_slots(index[None], count)[0]


def _cut_tiles(
    picture: Picture,
    tiles: Tiles,
    method: Method,
    budget: Budget | None,
    projector: Projector | None,
    checks: Checks,
) -> Cut | None:
    if budget is None:
        raise UnsupportedError(
            f"anyres='spatial' lays out tiles of equal counts, but {method.name} counts by itself; give a "
            f"budget per tile, as in '{method.name}(anyres=spatial)@64/crop'"
        )
    found = choose_in_tiles(tiles, picture.length, method, budget, projector, checks)
    if found is None:
        return None
    slots = torch.arange(found.rows.shape[0])
    return Cut(slots, found.keep_idx, found.grids, picture.length, slots, found.rows)
