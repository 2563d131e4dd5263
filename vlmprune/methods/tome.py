# SPDX-License-Identifier: Apache-2.0
"""ToMe: patches that are alike are averaged inside the vision encoder, a few behind every block.

Every second row a is matched with the most similar of the others, by the cosine of their attention keys k:

    b(a) = argmax_b cos(k_a, k_b),   x_b <- (s_b x_b + s_a x_a) / (s_b + s_a)   for the r most similar pairs

with s the number of patches that a row stands for. Later attention adds log s to the logits of a row, so that
it weighs as the patches in it do.

Deviations: rows are averaged at the end of a block, the paper does it between its attention and its MLP,
which hooks around an unmodified block cannot reach; r is not an option but what the budget asks for, spread
evenly over the blocks; a block averages several times where half of its rows is not enough.
[CLS] is never averaged. A merged row stands where its b stood.
Provenance: Bolya et al., arXiv:2210.09461; written from the paper; no code was read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.encoder import EncoderBlock, Shortened
from ..core.method import Method, SlotName
from ..core.select import rest_of, top_k
from ..registry import register


@register("tome")
@dataclass(frozen=True)
class ToMe(Method):
    """Averages similar patches inside the vision tower, as many behind every block."""

    slot: ClassVar[SlotName] = "encoder"
    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2210.09461"

    def shortens_at(self, depth: int) -> range:
        return range(max(depth - 1, 1))

    def shorten(self, block: EncoderBlock, k: int) -> Shortened:
        # mean over heads, without [CLS], which stands in front
        keys = block.keys.float().mean(dim=1)[:, -block.count :]  # (T, n, d)
        keys = torch.nn.functional.normalize(keys, dim=-1)
        crops, n = keys.shape[:2]
        into = torch.arange(n, device=keys.device).expand(crops, -1)
        keep = torch.ones(crops, n, dtype=torch.bool, device=keys.device)
        rows = into  # (T, m), those that are left
        # // of a negative number rounds away from 0: earlier blocks take more, so the last has no rest to
        # catch up
        goal = n + (k - n) // max(block.left, 1)
        while rows.shape[1] > goal:
            a, b = rows[:, ::2], rows[:, 1::2]
            # one round can take half of the rows at most
            r = min(rows.shape[1] - goal, b.shape[1], a.shape[1])
            pairs = _at(keys, a) @ _at(keys, b).transpose(1, 2)  # (T, a, b)
            best = pairs.max(dim=-1)
            chosen = top_k(best.values, r)
            source, target = a.gather(1, chosen), b.gather(1, best.indices.gather(1, chosen))
            # repeat, not expand: scatter needs rows of their own
            moved = torch.arange(n, device=keys.device).repeat(crops, 1).scatter(1, source, target)
            into = moved.gather(1, into)  # what had joined a row goes with it
            keep = keep.scatter(1, source, False)
            # chosen numbers every second row
            rows = rows.gather(1, rest_of(2 * chosen, rows.shape[1]))
        return Shortened(keep, into, count=rows.shape[1])


def _at(keys: Tensor, rows: Tensor) -> Tensor:
    """(T, m, d) keys of rows (T, m)."""
    return keys.gather(1, rows[..., None].expand(-1, -1, keys.shape[2]))
