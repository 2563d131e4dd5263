# SPDX-License-Identifier: Apache-2.0
"""PAINT: the row that predicts the next token looks harder at two sets of patches.

In deep layers text stops looking at the picture. Local tokens are what the first block of the tower looks at,
objects; summary tokens are the few outliers of a late block, which hold the picture as a whole. With l and g
the attention of [CLS] to N patches in these blocks, summed over heads, and Q1, Q3 the quartiles of g,

    summary = { i : g_i > Q3 + 1.5 (Q3 - Q1) }
    local   = the floor(N local_ratio) patches with the highest l, without the summary ones
    z'_j    = z_j + alpha |z_j| for local j,   z_j + beta |z_j| for summary j,   else z_j

with z the logits of the last row of the prompt, and of every later one, in all heads of a layer.

Deviations: the official count of summary tokens can be one too few, by rounding; its third set ("spatial")
ranks patches by the sum of a row of a softmax, which is 1 for all of them, and is not offered. Sets are found
per crop; there those of the first picture serve every row of a batch.
Provenance: "Fixing Imbalanced Attention", arXiv:2501.12206; written from a description of the official code
(commit 2a9e8f8, Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_int, check_number, one_of
from ..core.method import Method, Need, Rows, SlotName
from ..core.select import top_k
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register

LOCAL, SUMMARY = 1, 2  # marks
FIRST, LATE = 1, -2  # blocks, as indices into the hidden states of the tower
# the same as shares of the depth, which pass over blocks that attend inside windows
FIRST_WHOLE, LATE_WHOLE = 0.0, 0.95


@register("paint")
@dataclass(frozen=True)
class PAINT(Method):
    """Raises the logits of local and of summary tokens where the next token is predicted; prunes nothing.

    Args:
        alpha: strength for local tokens; 1 and more changes the order of negative logits.
        beta: strength for summary tokens.
        local_ratio: share of the patches that are local.
        summary: number of summary tokens; None: the outliers.
        first_layer: first decoder layer that is edited, up to the last one.
        cls: "cls", or "mean", the attention that patches receive, for towers without [CLS].
    """

    alpha: float = 0.7
    beta: float = 0.3
    local_ratio: float = 0.25
    summary: int | None = None
    first_layer: int = 2
    cls: str = "cls"

    slot: ClassVar[SlotName] = "attention"
    budgeted: ClassVar[bool] = False
    rows: ClassVar[Rows] = "last"
    mark_values: ClassVar[int] = SUMMARY
    paper: ClassVar[str] = "arXiv:2501.12206"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, least=0)
        check_number("beta", self.beta, least=0)
        check_number("local_ratio", self.local_ratio, least=0, most=1)
        check_int("first_layer", self.first_layer, least=0)
        one_of("cls", self.cls, ("cls", "mean"))
        if self.summary is not None:
            check_int("summary", self.summary, least=0)

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        if self.cls == "mean":
            return (Need("received_attention", FIRST_WHOLE), Need("received_attention", LATE_WHOLE))
        return (Need("cls_attention", FIRST), Need("cls_attention", LATE))

    def acts_on(self, depth: int) -> range:
        if self.first_layer >= depth:
            raise SpecError(f"first_layer={self.first_layer} leaves no layer of {depth} to edit; lower it")
        return range(self.first_layer, depth)

    def mark_tokens(self, tokens: VisualTokens) -> Tensor:
        """(B, N) int8: 1 for local tokens, 2 for summary tokens, 0 for the others."""
        first, late = self.looked_at(tokens)
        # outliers of the late block, or as many as asked for
        summary = outliers(late) if self.summary is None else highest_few(late, self.summary)
        # the highest of the first block; what is both is summary
        local = highest_few(first, int(tokens.count * self.local_ratio)) & ~summary
        return LOCAL * local.to(torch.int8) + SUMMARY * summary.to(torch.int8)

    def looked_at(self, tokens: VisualTokens) -> list[Tensor]:
        """(B, N) attention that patches get in the first block and in a late one."""
        layers = [need.layer for need in self.needs]
        if self.cls == "mean":
            return [tokens.need("received_attention", layer).float() for layer in layers]
        return [tokens.need("cls_attention", layer).float().sum(dim=1) for layer in layers]

    def relogit(self, logits: Tensor, marked: Tensor, visual: Tensor) -> Tensor:
        """Edited logits (B, H, R, S) for marks (B, S)."""
        strength = torch.zeros_like(marked, dtype=logits.dtype)
        strength = strength.masked_fill(marked == LOCAL, self.alpha).masked_fill(marked == SUMMARY, self.beta)
        # z + strength |z| raises negative logits, too
        return logits + strength[:, None, None] * logits.abs()


def outliers(g: Tensor) -> Tensor:
    """(B, N) bool, values beyond Tukey's upper fence of their row (B, N)."""
    q1, q3 = torch.quantile(g, torch.tensor([0.25, 0.75], device=g.device, dtype=g.dtype), dim=1)  # (B,)
    return g > (q3 + 1.5 * (q3 - q1))[:, None]


def highest_few(scores: Tensor, count: int) -> Tensor:
    """(B, N) bool, the ``count`` highest of each row (B, N), of 0 none and of more than N all."""
    found = torch.zeros_like(scores, dtype=torch.bool)
    count = min(count, scores.shape[1])
    return found.scatter(1, top_k(scores, count), True) if count else found
