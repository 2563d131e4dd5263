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

import torch
from torch import Tensor

from ...core.budget import Budget
from ...core.deferred import NOW, Checks
from ...core.method import Merged, Method, needs_of
from ...core.select import choose
from ...errors import InvariantError, UnsupportedError
from ..sequence.compaction import Compaction
from ..state import ForwardState
from ..vision.pictures import Grids, Picture, Unit, make_units, stack_units
from ..vision.tiles import choose_in_tiles
from . import Attachment, Handle

Projector = Callable[[Tensor], Tensor]


@dataclass(eq=False)
class Cut:
    """What stays of one picture.

    Args:
        kept_slots: (K,) placeholder slots that stay, newline and [CLS] slots included, in any order.
        keep_idx: (k,) patches that stay; ascending where nothing is merged, -1 for rows without a place.
        grids: blocks that ``keep_idx`` counts in: those of the picture, or of its tiles before unpadding.
        row_slots, rows: (M,) slots and the (M, D) embeddings that take their place, for merging methods.
    """

    kept_slots: Tensor
    keep_idx: Tensor
    grids: Grids
    row_slots: Tensor | None = None
    rows: Tensor | None = None

    @property
    def realised(self) -> int:
        """Visual tokens that the language model reads for this picture, slots that are no patches not
        counted.
        """
        return self.keep_idx.shape[0] if self.rows is None else self.rows.shape[0]


class BeforeLM:
    """Cuts the merged sequence before the first decoder layer."""

    def __init__(self, attachment: Attachment, method: Method, budget: Budget | None) -> None:
        self.attachment, self.method, self.budget = attachment, method, budget

    def hooks(self) -> list[Handle]:
        return []

    def missed(self, state: ForwardState) -> set[int]:
        return set()

    @torch.compiler.disable  # a prompt is read once: tracing this would cost more than it saves
    def enter(self, state: ForwardState) -> None:
        if not state.placements:
            return
        started = time.perf_counter()
        pictures, samples = listed(state)
        cuts = cut_pictures(
            pictures,
            samples,
            self.method,
            self.budget,
            self.attachment.adapter.projector,
            strict=self.attachment.strict,
            checks=state.checks,
        )
        state.cuts, report = cuts, state.report
        for number, cut in enumerate(cuts):
            if cut is not None:
                report.realised_tokens[number] = cut.realised
                report.layer_tokens[number] = [cut.realised] * self.attachment.depth
                report.kept[number], report.grids[number] = cut.keep_idx, cut.grids
        if any(cut is not None for cut in cuts):
            self._cut(state, cuts)
            report.seconds += time.perf_counter() - started

    def _cut(self, state: ForwardState, cuts: Sequence[Cut | None]) -> None:
        """Drop from the sequence what the cuts drop, and write the rows of merging methods."""
        embeds = state.embeds  # (B, L, D)
        batch, length = embeds.shape[:2]
        view = state.views.at(0)
        lengths = state.columns.lengths
        gone, kept, row_at, rows = [], [], [], []  # flat columns
        dropped = [0] * batch
        first = 0
        for placement in state.placements:
            for row, p, start in placement.spans():
                cut, picture = cuts[first + p], placement.pictures[p]
                if cut is None:
                    continue
                slots = placement.flat[start : start + picture.length]
                gone.append(slots)
                kept.append(slots[cut.kept_slots.to(slots.device)])
                dropped[row] += picture.length - cut.kept_slots.shape[0]
                if cut.rows is not None:
                    row_at.append(slots[cut.row_slots.to(slots.device)])
                    rows.append(cut.rows.to(embeds.device, embeds.dtype))
            first += len(placement.pictures)
        keep = torch.ones_like(view.new) if lengths is None else view.new.clone()
        keep = keep.flatten().index_fill_(0, joined(gone), False).index_fill_(0, joined(kept), True)
        keep = keep.view(batch, length)
        if rows:
            embeds = embeds.flatten(0, 1).index_copy(0, joined(row_at), joined(rows)).view_as(embeds)
        if lengths is None:
            width = length - dropped[0]
        elif state.columns.masked_pictures:
            width = None  # not every slot that goes was a token
        else:
            width = max(have - drop for have, drop in zip(lengths, dropped, strict=True))
        compaction = Compaction(keep, view.new, width)
        if compaction.width == 0:
            raise InvariantError(
                f"attention_mask of shape {(batch, length)} masks every token; expected 1 for tokens"
            )
        state.refuse_dead_slots(compaction, self.attachment.spec)
        state.views.cut(0, compaction, self.attachment.policy(self.method))
        state.report.sequence = (length, compaction.width)
        state.report.fire("enter")
        state.embeds = compaction.sequence(embeds)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts one after the other; one part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def listed(state: ForwardState) -> tuple[list[Picture], list[tuple[int, ...]]]:
    """All pictures of a forward, modality after modality, and those of every distinct prompt in reading
    order.
    """
    pictures: list[Picture] = []
    batch = state.embeds.shape[0]
    samples: list[list[int]] = [[] for _ in range(batch)]
    for placement in state.placements:
        for sample, row in zip(samples, placement.rows, strict=True):
            sample.extend(len(pictures) + p for p in row)
        pictures += placement.pictures
    return pictures, list(
        dict.fromkeys(tuple(sample) for sample in samples)
    )  # expanded rows share their pictures


def cut_pictures(
    pictures: Sequence[Picture],
    samples: Sequence[Sequence[int]],
    method: Method,
    budget: Budget | None,
    projector: Projector | None,
    *,
    strict: bool = False,
    checks: Checks = NOW,
) -> list[Cut | None]:
    """One Cut per picture, None where it stays whole. ``samples`` lists the pictures of each prompt."""
    if budget is None:
        return [None] * len(pictures)
    spatial = {
        p for p, picture in enumerate(pictures) if method.layout == "spatial" and picture.tiles is not None
    }
    cuts: list[Cut | None] = [None] * len(pictures)
    for p in spatial:
        cuts[p] = _cut_tiles(pictures[p], method, budget, projector, checks)
    units = make_units(
        pictures, [[p for p in sample if p not in spatial] for sample in samples], budget.scope
    )
    chosen = choose_units(units, pictures, method, budget, projector, strict=strict, checks=checks)
    by_picture: dict[int, list[Choice]] = defaultdict(list)
    for unit, choice in zip(units, chosen, strict=True):
        for p, part in split_by_picture(unit, choice, pictures, method):
            by_picture[p].append(part)
    for p, parts in by_picture.items():
        cuts[p] = to_slots(pictures[p], parts)
    return cuts


@dataclass(eq=False)
class Choice:
    """What was chosen of the tokens of one unit that lie in one picture.

    Args:
        own: (n,) patch indices of these tokens, None for all patches of the picture.
        index: (k,) tokens among them that stay, ascending; -1 for rows of a merging method without a place.
            None: all.
        rows: (k, D) of merging methods.
    """

    own: Tensor | None
    index: Tensor | None
    rows: Tensor | None = None

    def patches(self) -> Tensor | None:
        """(k,) patches of the picture that stay, -1 for rows without a place; None: all of them."""
        if self.index is None or self.own is None:
            return self.own if self.index is None else self.index
        own = self.own.to(self.index.device)
        return torch.where(self.index < 0, -1, own[self.index.clamp_min(0)])


def choose_units(
    units: Sequence[Unit],
    pictures: Sequence[Picture],
    method: Method,
    budget: Budget,
    projector: Projector | None,
    *,
    strict: bool,
    checks: Checks,
) -> list[Choice]:
    """What the method keeps of every unit; units of the same shape are asked for together."""
    groups: dict[tuple, list[int]] = defaultdict(list)
    for number, unit in enumerate(units):
        if strict and isinstance(budget.keep, int) and budget.keep > unit.count:
            raise InvariantError(
                f"strict: keep={budget.keep} tokens but unit {number} holds {unit.count}; lower keep or drop "
                "strict"
            )
        method.check_unit(unit.count)
        crops = sum(1 if unit.crop is not None else pictures[p].cls_count for p, _ in unit.members)
        groups[(unit.count, unit.grids, crops)].append(number)
    chosen = [Choice(None, None) for _ in units]
    for (count, _, _), numbers in groups.items():
        k = budget.count(count)
        if k >= count:  # keep = all is dense for every method, merging ones included
            continue
        tokens = stack_units([units[n] for n in numbers], pictures, needs_of(method), projector)
        result = choose(method, tokens, k, checks)
        for row, number in enumerate(numbers):
            if isinstance(result, Merged):
                chosen[number] = Choice(None, result.slots[row], result.features[row])
            else:
                chosen[number] = Choice(None, result[row])
    return chosen


def split_by_picture(
    unit: Unit, choice: Choice, pictures: Sequence[Picture], method: Method
) -> list[tuple[int, Choice]]:
    """The choice of a unit, told apart by picture."""
    if len(unit.members) == 1:
        p, own = unit.members[0]
        return [(p, Choice(own, choice.index, choice.rows))]
    if choice.rows is not None:
        raise UnsupportedError(
            f"{method.name} merges tokens and cannot spread one budget over several images: use scope image "
            "or crop"
        )
    parts, start = [], 0
    for p, _ in unit.members:  # scope "total": whole pictures, one after the other
        end = start + pictures[p].count
        index = choice.index
        here = None if index is None else index[(index >= start) & (index < end)] - start
        parts.append((p, Choice(None, here)))
        start = end
    return parts


def to_slots(picture: Picture, parts: Sequence[Choice]) -> Cut | None:
    """Turn the choices inside one picture into slots."""
    if all(part.index is None for part in parts):
        return None
    device = picture.features.device
    kept = [torch.arange(picture.count) if part.patches() is None else part.patches() for part in parts]
    keep_idx = kept[0] if len(kept) == 1 else torch.cat([one.to(device) for one in kept]).sort().values
    if all(part.rows is None for part in parts):
        slots = picture.slots_of(keep_idx)
        if picture.special is not None:
            slots = torch.cat([slots, picture.specials.to(slots.device)])
        return Cut(slots, keep_idx, picture.grids)
    return _to_rows(picture, parts, keep_idx)


def _to_rows(picture: Picture, parts: Sequence[Choice], keep_idx: Tensor) -> Cut:
    """Slots and rows of a merging method; a unit that is kept whole beside merged ones counts as rows too."""
    slots, rows = [], []
    # rows may be reordered freely only where nothing else stands between the patches
    listed_in_order = len(parts) == 1 and picture.special is None
    for part in parts:
        own = torch.arange(picture.count) if part.own is None else part.own
        if part.rows is None:
            patches = own if part.index is None else own.to(part.index.device)[part.index]
            slots.append(picture.slots_of(patches))
            rows.append(picture.patch_features(patches))
            continue
        own = own.to(part.index.device)
        hosts = hosts_of(picture.slots_of(own), part.index)  # (k,)
        slots.append(hosts.sort().values if listed_in_order else hosts)
        rows.append(part.rows)
    device = rows[0].device
    every = joined([one.to(device) for one in slots])
    merged = joined([one.to(device, rows[0].dtype) for one in rows])
    kept = every if picture.special is None else torch.cat([every, picture.specials.to(device)])
    return Cut(kept, keep_idx, picture.grids, every, merged)


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


def _cut_tiles(
    picture: Picture, method: Method, budget: Budget, projector: Projector | None, checks: Checks
) -> Cut | None:
    found = choose_in_tiles(picture.tiles, picture.length, method, budget, projector, checks)
    if found is None:
        return None
    slots = torch.arange(found.rows.shape[0])
    return Cut(slots, found.keep_idx, found.grids, slots, found.rows)
