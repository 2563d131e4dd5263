# SPDX-License-Identifier: Apache-2.0
"""FlowCut: patches leave the vision encoder while it runs, by a running score.

Redundancy emerges block by block, and the attention of one block misjudges it. Every block scores what is
left by attention, likeness and size; every second block drops as many patches as the concentration of its
attention allows:

    I = (a / sum a + s / sum s) * |v|_1,   c <- (c + I) / 2,   drop = (n - T) / sqrt(l) * (1 - e^2)

with a the attention of [CLS], s the softmax of the unscaled products of the values of [CLS] and the patches,
v the value of a patch, e the entropy of a over that of uniform attention, l blocks left, T patches wanted.
The kept patches went through the later blocks without the others, so their features change.

Deviations: drop counts are per picture, the authors take the largest of a batch (``variant="official"``),
which ties a picture's answer to its neighbours; 0 log 0 is 0, where theirs is NaN; float32. Towers without
[CLS] are refused. The second cut that the authors make inside the language model for tiled pictures is a
method of its own there: add one, as in ``flowcut@64/crop+fastv@64``.
Provenance: Tong et al., arXiv:2505.19536; written from a description of paper and official code (commit
a2ecd24, Apache-2.0); no code copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import one_of
from ..core.encoder import EncoderBlock, Shortened
from ..core.method import Method, SlotName, What
from ..core.select import highest
from ..registry import register


@register("flowcut")
@dataclass(frozen=True)
class FlowCut(Method):
    """Drops patches inside the vision tower, most of them before its last block.

    Args:
        variant: "row" counts what is dropped in every crop alone, "official" drops the largest count of a
            batch everywhere.
    """

    variant: str = "row"

    slot: ClassVar[SlotName] = "encoder"
    needs: ClassVar[tuple[What, ...]] = ("cls_attention",)
    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2505.19536"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("variant", self.variant, ("row", "official"))

    def shortens_at(self, depth: int) -> range:
        return range(depth - 1)  # the last block before the features runs on what is wanted

    def shorten(self, block: EncoderBlock, k: int) -> Shortened:
        n = block.alive.sum(dim=1)  # (T,)
        a = block.need("cls_attention").float().mean(dim=1)  # (T, n)
        # the entry of [CLS] is gone, so the row sums to less than 1
        a = a / a.sum(dim=1, keepdim=True)
        s = likeness(block.values, block.alive)
        # without [CLS], which stands in front
        score = importance(a, s, block.values[:, :, -block.count :].float().mean(dim=1))
        # c, the running score; no notes are there behind the first block
        c = score if block.notes is None else (block.notes + score) / 2
        left = block.left - 1
        # every second block drops; the others only bring the running score up to date
        if left % 2:
            return Shortened(notes=c)
        drop = drops(a, n, k, left)
        if self.variant == "official":
            drop = drop.amax().expand_as(drop)
        # never below what is wanted, and crops that hold no more lose nothing
        keep = highest(c, torch.where(n > k, (n - drop).clamp_min(k), n), block.alive)
        return Shortened(keep, notes=c, count=None if left else k)


def likeness(values: Tensor, alive: Tensor) -> Tensor:
    """(T, n) softmax over the tokens of the unscaled products of the first value (T, H, 1 + n, d) with all of
    them, mean over heads and without the first.
    """
    values = values.float()
    logits = (values[:, :, :1] @ values.transpose(2, 3))[:, :, 0]  # (T, H, 1 + n)
    # patches that left earlier take no part; [CLS] is always there
    hidden = torch.nn.functional.pad(~alive, (1, 0))[:, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).mean(dim=1)[:, 1:]


def importance(a: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """(T, n) score of patches by attention (T, n), likeness (T, n) and values (T, n, d)."""
    a, s = (share / share.sum(dim=1, keepdim=True) for share in (a, s))
    return (a + s) * v.abs().sum(dim=-1)


def drops(a: Tensor, n: Tensor, target: int, left: int) -> Tensor:
    """(T,) patches to drop of n (T,) by attention (T, n) that sums to 1, with so many blocks left.

    At the last block all of them: the caller stops at the target.
    """
    if left == 0:
        return n
    # 1 - e^2 is a small difference of numbers near 1, and it is rounded to whole patches
    p = a.double()
    entropy = -torch.xlogy(p, p).sum(dim=1)
    e = entropy / n.double().log().clamp_min(1e-12)  # one patch is as even as can be
    return ((n - target) / math.sqrt(left) * (1 - e**2)).round().long()
