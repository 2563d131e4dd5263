# SPDX-License-Identifier: Apache-2.0
"""Call: the record of one forward of the multimodal model, and which picture stands where in its batch. Dies with the call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvariantError
from .compaction import Compaction
from .cutting import Cut
from .frames import Frame
from .pictures import Picture
from .report import Report


@dataclass(eq=False)
class Placed:
    """The pictures of one modality in the batch.

    Args:
        visual: (B, q) bool, placeholder columns.
        rows: pictures of every row, in order.
        pictures, cuts: as encoded, not expanded for beams.
    """

    visual: Tensor
    rows: list[list[int]]
    pictures: Sequence[Picture]
    cuts: Sequence[Cut | None]

    def reading_order(self) -> list[tuple[Picture, Cut | None]]:
        """Every picture as often as it stands in the batch, row after row."""
        return [(self.pictures[p], self.cuts[p]) for row in self.rows for p in row]

    def kept_slots(self) -> Tensor:
        """Keep flags of all placeholder columns, row after row."""
        whole = [torch.ones(p.length, dtype=torch.bool) if cut is None else cut.keep for p, cut in self.reading_order()]
        return torch.cat(whole) if whole else torch.ones(0, dtype=torch.bool)

    def replace(self, embeds: Tensor) -> Tensor:
        """Put merged rows into the embeddings (B, q, D)."""
        slots, rows, start = [], [], 0
        for picture, cut in self.reading_order():
            if cut is not None and cut.rows is not None:
                slots.append(cut.slots + start)
                rows.append(cut.rows.to(embeds.device, embeds.dtype))
            start += picture.length
        if not rows:
            return embeds
        where = self.visual.flatten().nonzero()[:, 0][torch.cat(slots).to(self.visual.device)]
        return embeds.flatten(0, 1).index_copy(0, where, torch.cat(rows)).view_as(embeds)


@dataclass(eq=False)
class Call:
    """State of one forward of the multimodal model."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    report: Report
    continues: bool = False  # a cache holds earlier tokens
    tail: int = 0  # columns after the end of the prompt: draft tokens of assisted decoding
    pictures: dict[str, list[Picture]] = field(default_factory=dict)  # per modality, not expanded for beams
    placed: list[Placed] = field(default_factory=list)
    entered: bool = False
    cache: Any = None
    mask: Any = None  # attention mask and token types as given, where the model makes its masks of them too early
    types: Tensor | None = None
    frames: list[Frame] = field(default_factory=list)  # one per group of layers, by first layer
    compactions: list[tuple[int, Compaction]] = field(default_factory=list)  # (layer, cut at its input), in order
    seen: int = 0  # tokens of the conversation before this call
    fed: int = 0  # tokens fed in this call
    given: Any = None  # what the layer that runs now was given, for re-weighting
    marks: dict[int, Any] = field(default_factory=dict)  # per layer, slots that a re-weighting method marked
    marks_before: dict[int, Any] = field(default_factory=dict)  # the same from earlier calls
    stacked: int = 0  # layers after which features were added to hidden states (DeepStack)
    units: Any = None  # tokens that cuts inside the language model still choose from

    def frame(self, layer: int) -> Frame:
        """The frame of a layer."""
        return next(frame for frame in reversed(self.frames) if frame.start <= layer)

    def cut(self, layer: int, compaction: Compaction, policy: str) -> None:
        """Record a cut at the input of ``layer``: it opens a frame there and shortens all later ones."""
        if not any(frame.start == layer for frame in self.frames):
            at = next((i for i, frame in enumerate(self.frames) if frame.start > layer), len(self.frames))
            self.frames.insert(at, replace(self.frame(layer), start=layer, _masks={}, _angles={}))
        self.frames = [frame.cut(compaction, policy) if frame.start >= layer else frame for frame in self.frames]
        self.compactions.append((layer, compaction))

    @property
    def tail_kept(self) -> int:
        """Columns at the end of this call that every row keeps in every layer."""
        return min((compaction.tail for _, compaction in self.compactions), default=self.fed)

    def visual_of(self, layer: int) -> Tensor:
        """(B, n) bool, placeholder columns of the sequence that a layer reads."""
        return self._follow(torch.stack([placed.visual for placed in self.placed]).any(dim=0), layer)

    def text_of(self, layer: int) -> Tensor:
        """(B, n) bool, columns after the last picture of each row that has one."""
        visual = torch.stack([placed.visual for placed in self.placed]).any(dim=0)
        after = visual.flip(1).to(torch.int8).cummax(dim=1).values.flip(1) == 0
        return self._follow(after & visual.any(dim=1, keepdim=True), layer)

    def _follow(self, mask: Tensor, layer: int) -> Tensor:
        for start, compaction in self.compactions:
            if start <= layer:
                mask = mask.gather(1, compaction.index) & compaction.valid
        return mask

    def expand(self, hidden: Tensor, layer: int | None = None) -> Tensor:
        """(B, n, D) back to the full length; ``layer`` is the one whose output this is (None: the last)."""
        for start, compaction in reversed(self.compactions):
            if layer is None or start <= max(layer, 0):
                hidden = compaction.expand(hidden)
        return hidden


def assign(lengths: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Pictures of every row: ``lengths`` of the pictures as encoded, ``counts`` of placeholders per (maybe expanded) row.

    With beams or several returned sequences each prompt is repeated ``E`` times in a row while its pictures are encoded once.
    """
    total, slots = sum(lengths), sum(counts)
    if total == 0 or slots == 0 or slots % total:
        raise InvariantError(
            f"{slots} placeholder tokens for pictures of {list(lengths)} tokens; expected a whole multiple of {total}"
        )
    expand = slots // total
    rows: list[list[int]] = []
    picture = 0
    for start in range(0, len(counts), expand):
        need, mine = counts[start], []
        while need > 0 and picture < len(lengths):
            mine.append(picture)
            need -= lengths[picture]
            picture += 1
        if need or any(count != counts[start] for count in counts[start : start + expand]):
            raise InvariantError(f"placeholders per row {list(counts)} do not line up with pictures of {list(lengths)} tokens")
        rows.extend([mine] * expand)
    return rows
