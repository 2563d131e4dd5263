# SPDX-License-Identifier: Apache-2.0
"""Cut: what stays of one picture, and the sequence without what does not, before the language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.method import Positions
from ...errors import InvariantError
from ..sequence.compaction import Compaction, EvenCompaction
from ..sequence.placement import Placement
from ..sequence.views import SequenceView
from ..state import ForwardState
from ..vision.pictures import Grids, Picture


@dataclass(eq=False)
class Cut:
    """What stays of one picture.

    Args:
        kept_slots: (K,) placeholder slots that stay, newline and [CLS] slots included, in any order.
        keep_idx: (k,) patches that stay; ascending where nothing is merged, otherwise in the order of the
            rows, -1 for rows without a place.
        grids: blocks that ``keep_idx`` counts in: those of the picture, or of its tiles before unpadding.
        length: slots that the picture had.
        row_slots, rows: (M,) slots and the (M, D) embeddings that take their place, for merging methods.
        joins: gives (N,) or (N, J) int64, for each patch the rows that it became part of, by the names of
            ``core.merged.names_of``, -1 for none; None where that is not said.
    """

    kept_slots: Tensor
    keep_idx: Tensor
    grids: Grids
    length: int
    row_slots: Tensor | None = None
    rows: Tensor | None = None
    joins: Callable[[], Tensor] | None = None

    @classmethod
    def of(cls, picture: Picture, keep_idx: Tensor) -> Cut:
        """Patches ``keep_idx`` (k,) of a picture that stay as they are, and all slots that are none."""
        slots = keep_idx
        if picture.special is not None:
            slots = torch.cat([picture.slots_of(slots), picture.specials.to(slots.device)])
        return cls(slots, keep_idx, picture.grids, picture.length)

    @property
    def realised(self) -> int:
        """Visual tokens that the language model reads for this picture, newlines not counted."""
        return self.keep_idx.shape[0] if self.rows is None else self.rows.shape[0]


def cut_sequence(state: ForwardState, cuts: Sequence[Cut | None], policy: Positions, spec: str) -> None:
    """Drop from the sequence what the cuts drop, write the rows of merging methods, and report it.

    Args:
        policy: of position ids.
        spec: what was attached, for messages.
    """
    state.picture_cuts, report = cuts, state.report
    if all([cut is None for cut in cuts]):
        return
    for number, cut in enumerate(cuts):
        if cut is not None:
            report.realised_tokens[number] = cut.realised
            report.layer_tokens[number] = [cut.realised] * len(report.layer_tokens[number])
            # what the model itself left forms no blocks: all that was encoded does
            report.kept[number], report.grids[number] = cut.keep_idx, cut.grids or report.grids[number]
            if cut.joins is not None:
                report.joins[number] = cut.joins
    embeds, view, lengths = state.embeds, state.views.at(0), state.columns.lengths
    dropped = [0] * embeds.shape[0]
    found = numbered(state, cuts)
    for _, row, _, cut in found:
        dropped[row] += cut.length - cut.kept_slots.shape[0]
    if any([cut.rows is not None for _, _, _, cut in found]):
        embeds = with_rows(embeds, found)  # (B, L, D)
    length = embeds.shape[1]
    is_padded = lengths is not None and max(lengths) < length
    # even rows are cut in one launch; of a batch with padding columns of padding go as well
    if lengths is None or (len(set(dropped)) == 1 and not is_padded):  # one row loses what it loses
        compaction = even(view, stays(state, cuts), dropped[0], [embeds], policy)
    else:
        width = max(have - drop for have, drop in zip(lengths, dropped, strict=True))
        compaction = uneven(view, flat_columns(found), width)
    if compaction.width == 0:
        raise InvariantError(
            f"{spec!r} keeps no visual token, and a prompt of this call holds nothing else: there is nothing "
            "left to read; ask something about the picture"
        )
    if not compaction.is_even:
        state.refuse_dead_slots(compaction, spec)
    state.views.cut(0, compaction, policy)
    report.sequence = (length, compaction.width)
    report.fire("enter")
    # last: until here an error leaves the sequence as it was
    state.embeds = compaction.sequence(embeds)


# placement, row, first slot and cut of a picture in a row
Numbered = tuple[Placement, int, int, Cut]


def numbered(state: ForwardState, cuts: Sequence[Cut | None]) -> list[Numbered]:
    """Every picture in every row that loses tokens, in reading order."""
    found: list[Numbered] = []
    first = 0
    for placement in state.placements:
        for row, p, start in placement.spans:
            cut = cuts[first + p]
            if cut is not None:
                found.append((placement, row, start, cut))
        first += len(placement.pictures)
    return found


def stays(state: ForwardState, cuts: Sequence[Cut | None]) -> Tensor:
    """(B, L) float32: 1 for columns that stay, 0 for those that go."""
    device, first = state.embeds.device, 0
    found = torch.ones(state.embeds.shape[:2], device=device)
    for placement in state.placements:
        marks, kept = torch.zeros(placement.total, device=device), []
        for _, p, start in placement.spans:
            cut, length = cuts[first + p], placement.pictures[p].length
            if cut is None:
                marks[start : start + length].fill_(1.0)
            else:
                kept.append(cut.kept_slots.to(device) + start if start else cut.kept_slots.to(device))
        if kept:
            marks.index_fill_(0, joined(kept), 1.0)
        # slots are counted in the order of their columns
        found = found.masked_scatter(placement.visual, marks)
        first += len(placement.pictures)
    return found


def with_rows(embeds: Tensor, found: Sequence[Numbered]) -> Tensor:
    """(B, L, D) the sequence with the rows of merging methods in their slots."""
    at, rows = [], []
    for placement, _, start, cut in found:
        if cut.rows is not None and cut.row_slots is not None:
            slots = placement.flat[start : start + cut.length]
            at.append(slots[cut.row_slots.to(slots.device)])
            rows.append(cut.rows.to(embeds.device, embeds.dtype))
    return embeds.flatten(0, 1).index_copy(0, joined(at), joined(rows)).view_as(embeds)


def flat_columns(found: Sequence[Numbered]) -> tuple[list[Tensor], list[Tensor]]:
    """Flat columns (row * L + column) of the pictures that are cut, and those of them that stay."""
    gone, kept = [], []
    for placement, _, start, cut in found:
        slots = placement.flat[start : start + cut.length]
        gone.append(slots)
        kept.append(slots[cut.kept_slots.to(slots.device)])
    return gone, kept


def drop_columns(
    view: SequenceView,
    lengths: Sequence[int] | None,
    columns: tuple[Sequence[Tensor], Sequence[Tensor]],
    dropped: Sequence[int],
    along: Sequence[Tensor],
    policy: Positions,
) -> Compaction:
    """The cut of a view that drops flat columns.

    Args:
        lengths: tokens of every row, None for one row, which nothing has to be even with.
        columns: those that go, and those of them that stay.
        dropped: tokens that every row loses.
        along: (B or 1, n, *), what is cut with it.
    """
    if lengths is None or (len(set(dropped)) == 1 and max(lengths) == view.new.shape[1]):
        found = mark(torch.ones(view.new.shape, device=view.new.device), *columns)
        return even(view, found, dropped[0], along, policy)
    return uneven(view, columns, max(have - drop for have, drop in zip(lengths, dropped, strict=True)))


def even(
    view: SequenceView, found: Tensor, dropped: int, along: Sequence[Tensor], policy: Positions
) -> Compaction:
    """The cut of a view every row of which loses as many tokens: those where ``found`` (B, L) is 0."""
    slides = view.counted and policy == "compact"
    position_ids = None if slides else view.position_ids
    width = found.shape[1] - dropped
    return EvenCompaction(found, width, view.new, position_ids, along, whole=view.maskless)


def uneven(view: SequenceView, columns: tuple[Sequence[Tensor], Sequence[Tensor]], width: int) -> Compaction:
    """The same where rows differ in length, or padding goes as well; ``width`` of the longest."""
    return Compaction(mark(view.new.clone(), *columns), view.new, width)


def mark(found: Tensor, gone: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
    """``found`` (B, L) with 0 at the flat columns ``gone``, and with 1 at those of them that are ``kept``."""
    # what stays is written over what goes: no difference of two sets has to be made
    flat = found.flatten().index_fill_(0, joined(gone), 0)
    return (flat.index_fill_(0, joined(kept), 1) if kept else flat).view_as(found)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts one after the other; one part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def listed(state: ForwardState) -> tuple[list[Picture], list[tuple[int, ...]]]:
    """All pictures of a forward, and the numbers of those of every distinct prompt."""
    pictures: list[Picture] = []
    batch = state.embeds.shape[0]
    samples: list[list[int]] = [[] for _ in range(batch)]
    for placement in state.placements:
        for sample, row in zip(samples, placement.rows, strict=True):
            sample.extend(len(pictures) + p for p in row)
        pictures += placement.pictures
    # expanded rows share their pictures
    return pictures, list(dict.fromkeys(tuple(sample) for sample in samples))
