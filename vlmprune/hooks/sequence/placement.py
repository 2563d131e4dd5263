# SPDX-License-Identifier: Apache-2.0
"""Placement: where the pictures of one forward stand in its batch.

Slots are counted picture by picture, row after row. Where they stand in the sequence is a tensor on the
device; how many there are is known on the host, from shapes alone for a single prompt. A batch asks the
device once, for its ids: which row has which pictures cannot be told from shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ...core.deferred import Checks
from ...errors import InvariantError
from ..vision.pictures import Picture


@dataclass(eq=False)
class Placement:
    """The pictures of one modality in the batch.

    Args:
        pictures: as encoded, not expanded for beams.
        rows: numbers of the pictures of every row, in reading order.
        visual: (B, L) bool, their placeholder columns.
        host: the same on the CPU; None for a single prompt, of which shapes say enough.

    Attributes:
        spans: (row, picture, first slot) of every picture in every row that shows it, in reading order.
        total: S, slots of all pictures in all rows.
    """

    pictures: Sequence[Picture]
    rows: list[list[int]]
    visual: Tensor
    host: Tensor | None

    spans: list[tuple[int, int, int]] = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.spans, self.total = [], 0
        for row, mine in enumerate(self.rows):
            for p in mine:
                self.spans.append((row, p, self.total))
                self.total += self.pictures[p].length

    @cached_property
    def flat(self) -> Tensor:
        """(S,) where each slot stands, as row * L + column, in reading order, row after row."""
        if self.host is not None:
            return self.host.flatten().nonzero()[:, 0].to(self.visual.device)
        # placeholders first, each kind in ascending order
        return self.visual.flatten().to(torch.int8).argsort(descending=True, stable=True)[: self.total]

    def columns(self, row: int, start: int, slots: Tensor | int) -> Tensor:
        """(n,) columns in ``row`` of some slots (n,) of the picture whose first slot is ``start``.

        A number stands for that many first slots.
        """
        if isinstance(slots, int):
            flat = self.flat[start : start + slots]
        else:
            flat = self.flat[start + slots.to(self.flat.device)]
        return flat - row * self.visual.shape[1] if row else flat


@dataclass(eq=False)
class Columns:
    """What is known of the columns of a batch.

    Args:
        visual: per modality (B, L) bool, its placeholder columns.
        valid: (B, L) bool, columns that are tokens and not padding; None: all.
        host: the same on the CPU, visual ones first; None for a single prompt, of which shapes say enough.
        lengths: tokens of every row, None for a single prompt.
    """

    visual: list[Tensor]
    valid: Tensor | None
    host: Tensor | None = None

    lengths: list[int] | None = None

    @classmethod
    def of(cls, visual: list[Tensor], valid: Tensor | None) -> Columns:
        """Look at the columns; a batch on a device waits for this once, a single prompt never."""
        if visual[0].shape[0] == 1:
            return cls(visual, valid)
        # one copy for all that the host has to know of a batch
        every = torch.ones_like(visual[0]) if valid is None else valid.to(visual[0].device)
        host = torch.stack([*visual, every]).cpu()
        return cls(visual, valid, host, host[-1].sum(dim=1).tolist())

    @cached_property
    def pictures(self) -> Tensor:
        """(B, L) bool, placeholder columns of all modalities."""
        return torch.stack(self.visual).any(dim=0)

    @cached_property
    def with_pictures(self) -> Tensor:
        """(B, 1) bool, rows that have a picture."""
        return self.pictures.any(dim=1, keepdim=True)

    def after_pictures(self) -> Tensor:
        """(B, L) bool, columns after the last placeholder of each row; all columns of a row without any."""
        # on the CPU where that is known already: a device is not asked
        columns = torch.arange(self.visual[0].shape[1])
        if self.host is not None:
            last = (self.host[:-1].any(dim=0) * (columns + 1)).amax(
                dim=1, keepdim=True
            )  # (B, 1), 0 where there is none
            return (columns >= last).to(self.visual[0].device)
        columns = columns.to(self.visual[0].device)
        last = self.pictures.mul(columns + 1).amax(dim=1, keepdim=True)
        return columns >= last


def place(pictures: Sequence[Picture], columns: Columns, modality: int, checks: Checks) -> Placement:
    """Find the pictures of one modality, given by its number, in a batch."""
    lengths, visual = [picture.length for picture in pictures], columns.visual[modality]
    if columns.host is not None:
        here, tokens = columns.host[modality], columns.host[-1]
        rows = assign(lengths, here.sum(dim=1).tolist())
        if bool((here & ~tokens).any()):
            raise _misplaced(lengths, here, tokens)
        return Placement(pictures, rows, visual, here)
    tokens = visual if columns.valid is None else visual & columns.valid
    checks.require(tokens.sum() == sum(lengths), lambda: _misplaced(lengths, visual, tokens))
    return Placement(pictures, [list(range(len(pictures)))], visual, None)


def _misplaced(lengths: list[int], visual: Tensor, tokens: Tensor) -> InvariantError:
    """The error for placeholders (B, L) that are not as many as the pictures have tokens, or are masked."""
    masked = int((visual & ~tokens).sum())
    if masked:
        return InvariantError(
            f"attention_mask hides {masked} of {int(visual.sum())} placeholder tokens of pictures in "
            f"{tuple(visual.shape)} columns; expected 1 for all of them: to hide a picture, leave it out of "
            "the prompt"
        )
    return InvariantError(
        f"{int(visual.sum())} placeholder tokens for pictures of {lengths} tokens; expected {sum(lengths)}"
    )


def assign(lengths: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Pictures of every row: ``lengths`` of the pictures as encoded, ``counts`` of placeholders per row.

    With beams or several returned sequences each prompt is repeated ``E`` times in a row while its pictures
    are encoded once.
    """
    # every prompt is repeated alike, so that the whole says how often
    total, slots = sum(lengths), sum(counts)
    if total == 0 or slots == 0 or slots % total:
        raise InvariantError(
            f"{slots} placeholder tokens for pictures of {list(lengths)} tokens; expected a whole multiple "
            f"of {total}"
        )
    expand = slots // total
    rows: list[list[int]] = []
    picture = 0
    # one row of each prompt: the others have the same pictures
    for start in range(0, len(counts), expand):
        need, mine = counts[start], []
        while need > 0 and picture < len(lengths):
            mine.append(picture)
            need -= lengths[picture]
            picture += 1
        # a prompt that ends inside a picture, or repeated rows that differ
        if need or any(count != counts[start] for count in counts[start : start + expand]):
            raise InvariantError(
                f"placeholders per row {list(counts)} do not line up with pictures of {list(lengths)} tokens"
            )
        rows.extend([mine] * expand)
    return rows
