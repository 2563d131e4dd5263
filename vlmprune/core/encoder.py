# SPDX-License-Identifier: Apache-2.0
"""What a method of the encoder slot reads at a block of the vision tower, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import CaptureError


@dataclass(frozen=True, eq=False)
class EncoderBlock:
    """The end of one block of a vision tower: T crops of n patches each, in reading order.

    A crop with fewer patches than the others is filled up at its end; ``alive`` says which rows are patches.

    Args:
        left: blocks that still run before the model takes its features; 0 at the last one.
        hidden: (T, n, C) output of the block, without [CLS].
        keys, values: (T, H, p + n, d) of its attention, the p tokens in front of the patches included.
        sizes: (T, n) patches of the picture that each row stands for.
        alive: (T, n) bool, rows that are patches.
        cls_attention: (T, H, n) what [CLS] pays to them, where the method needs it.
        received_attention: (T, n) what they receive, mean over heads and queries, where the method needs it.
        notes: (T, n) what the method noted about these rows at the block before, None at the first.
    """

    left: int
    hidden: Tensor
    keys: Tensor
    values: Tensor
    sizes: Tensor
    alive: Tensor
    cls_attention: Tensor | None = None
    received_attention: Tensor | None = None
    notes: Tensor | None = None

    @property
    def count(self) -> int:
        """n, rows of a crop, filling included."""
        return self.hidden.shape[1]

    def need(self, name: str) -> Tensor:
        """A field, or an error that says what was not captured."""
        value = getattr(self, name)
        if value is None:
            raise CaptureError(f"this method reads {name!r} of a block; declare it in its needs")
        return value


@dataclass(frozen=True, eq=False)
class Shortened:
    """What goes on into the next block.

    Args:
        keep: (T, n) bool, rows that stay; None: all of them.
        into: (T, n) int64, the row that each row is averaged into, by size; rows that stay name themselves.
            None: what does not stay is dropped.
        notes: (T, n) about the rows of this block, for the method itself at the next one.
        count: how many rows of every crop stay, where no value says it; None: it is counted.
    """

    keep: Tensor | None = None
    into: Tensor | None = None
    notes: Tensor | None = None
    count: int | None = None
