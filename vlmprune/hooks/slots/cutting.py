# SPDX-License-Identifier: Apache-2.0
"""Cut: what stays of one picture, and the sequence without what does not, before the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.method import Method
from ...errors import InvariantError
from ..sequence.compaction import Compaction
from ..state import ForwardState
from ..vision.pictures import Grids, Picture
from . import Attachment


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

    @classmethod
    def of(cls, picture: Picture, keep_idx: Tensor) -> Cut:
        """Patches ``keep_idx`` (k,) of a picture that stay as they are, and all slots that are none."""
        slots = picture.slots_of(keep_idx)
        if picture.special is not None:
            slots = torch.cat([slots, picture.specials.to(slots.device)])
        return cls(slots, keep_idx, picture.grids)

    @property
    def realised(self) -> int:
        """Visual tokens that the language model reads for this picture, newlines not counted."""
        return self.keep_idx.shape[0] if self.rows is None else self.rows.shape[0]


def cut_sequence(
    state: ForwardState, attachment: Attachment, method: Method, cuts: Sequence[Cut | None]
) -> None:
    """Drop from the sequence what the cuts drop, write the rows of merging methods, and report it."""
    state.cuts, report = cuts, state.report
    if all(cut is None for cut in cuts):
        return
    for number, cut in enumerate(cuts):
        if cut is not None:
            report.realised_tokens[number] = cut.realised
            report.layer_tokens[number] = [cut.realised] * attachment.depth
            report.kept[number], report.grids[number] = cut.keep_idx, cut.grids
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
            if cut.rows is not None and cut.row_slots is not None:
                row_at.append(slots[cut.row_slots.to(slots.device)])
                rows.append(cut.rows.to(embeds.device, embeds.dtype))
        first += len(placement.pictures)
    keep = staying(view.new, gone, kept, known=lengths is not None)
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
    state.refuse_dead_slots(compaction, attachment.spec)
    state.views.cut(0, compaction, attachment.policy(method))
    report.sequence = (length, compaction.width)
    report.fire("enter")
    state.embeds = compaction.sequence(embeds)


def staying(new: Tensor, gone: Sequence[Tensor], kept: Sequence[Tensor], *, known: bool) -> Tensor:
    """(B, L) bool, columns that stay: all but those in ``gone``, of which those in ``kept`` stay as well.

    Args:
        new: (B, L) bool, columns that are tokens.
        gone, kept: flat columns, row * L + column.
        known: how many tokens a row has is known, so that padding need not count as kept.
    """
    keep = new.clone() if known else torch.ones_like(new)
    keep = keep.flatten().index_fill_(0, joined(gone), False).index_fill_(0, joined(kept), True)
    return keep.view_as(new)


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
