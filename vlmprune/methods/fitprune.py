# SPDX-License-Identifier: Apache-2.0
"""FitPrune: a calibrated number of visual tokens leaves after every layer of the language model.

Ye et al., "Fit and Prune: Fast and Training-free Visual Token Pruning for Multi-modal Large Language Models",
arXiv:2409.10197 (AAAI 2025).

With M_qj the largest softmaxed attention of any head of layer l from q to j, and n tokens left of the
picture,

    cross_j = sum of M_qj over the text q behind the picture,
    self_j  = 1/n * sum of M_qj over the tokens q of the picture,

the d_l tokens with the smallest cross_j * self_j leave behind layer l. How many is fitted offline, so that
the attention that tokens receive changes little for a budget of FLOPs; the published tables are for
LLaVA-1.5-7B.

Deviations: each picture and sample by itself, the true span, float32; of equal tokens the later one leaves,
the official code lets the earlier one go; newline tokens stay; deletions behind the last layer, which save
nothing, are left out; without text behind the picture the last token of the prompt stands in for it. Other
depths and counts take the share that a table deletes up to the same relative depth, which is not calibrated.
Provenance: written from a description of the official code (commit d28e418, no licence file); no code copied.
The tables are its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_int, one_of
from ..core.method import CutPoint, Method, Need, Positions, SlotName
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register

PATCHES = 576  # of the pictures that the tables were fitted on
# nominal share of FLOPs that is saved, in percent -> tokens of 576 that leave behind layers 0, 1, ...; none
# leave behind those that are not listed
TABLES: dict[int, tuple[int, ...]] = {
    10: (0, 0, 1, 2, 1, 0, 1, 4, 5, 5, 11, 4, 2, 2, 0, 0, 1, 1, 2, 4, 2, 10, 1, 1, 1, 2, 1, 1, 0, 1),
    20: (0, 0, 3, 3, 1, 1, 4, 16, 14, 15, 24, 4, 2, 3, 2, 0, 6, 0, 5, 13, 4, 19, 2, 1, 1, 1, 1, 1, 2, 1),
    30: (0, 0, 7, 6, 4, 5, 16, 40, 24, 21, 24, 4, 2, 3, 4, 0, 16, 0, 11, 26, 6, 32, 3, 1, 0, 1, 2, 2, 4),
    40: (0, 1, 21, 13, 14, 11, 41, 53, 29, 15, 14, 5, 1, 4, 5, 1, 26, 1, 13, 28, 6, 27, 2, 1, 0, 0, 1, 1, 2),
    50: (3, 7, 49, 24, 29, 17, 59, 41, 26, 8, 10, 6, 2, 5, 7, 2, 30, 3, 13, 27, 5, 23, 2, 1, 0, 0, 1, 1, 2),
    55: (6, 17, 69, 31, 34, 19, 59, 30, 23, 6, 8, 7, 2, 5, 8, 2, 29, 4, 12, 25, 4, 19, 2, 1, 0, 0, 1, 0, 1),
    60: (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1, 0, 0, 1, 0, 1),
    70: (48, 79, 118, 41, 33, 17, 36, 9, 9, 2, 3, 2, 1, 3, 4, 8, 18, 7, 8, 20, 4, 13, 2, 1, 0, 0, 1, 0, 1),
    80: (128, 127, 118, 35, 26, 8, 13, 3, 2, 1, 0, 0, 0, 2, 1, 8, 7, 8, 5, 11, 2, 6, 1, 1, 0, 0, 0, 1),
    90: (262, 153, 80, 19, 13, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 1, 2, 0, 1, 0, 0, 0, 0, 0, 1),
}
DEPTH = 32  # layers of the model that they were fitted on


@register("fitprune")
@dataclass(frozen=True)
class FitPrune(Method):
    """Deletes behind every layer, as the table of ``percent`` says, or as the one nearest to the budget does.

    Args:
        percent: share of FLOPs that is saved on LLaVA-1.5-7B, 10 to 90; only without a budget.
        schedule: tokens of 576 that leave behind each layer, one number per layer, from a calibration of your
            own; in place of the published tables.
        final: the budget counts the tokens that are left in the end; else their mean over the layers.
        min_delete: a layer behind which fewer tokens would leave waits for the next one; saves time.
        causal_correction: divide self_j by the number of tokens of the picture that can see j, which is
            larger for early ones.
    """

    percent: int = 60
    schedule: tuple[int, ...] | None = None
    final: bool = False
    min_delete: int = 1
    causal_correction: bool = False

    slot: ClassVar[SlotName] = "inside_lm"
    query_aware: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    nested: ClassVar[bool] = False  # other budgets cut at other layers
    positions: ClassVar[Positions] = "original"
    needs: ClassVar[tuple[Need, ...]] = (Need("text_attention", text="question"), Need("lm_received"))
    paper: ClassVar[str] = "arXiv:2409.10197"
    licence: ClassVar[str] = "none stated"

    def __post_init__(self) -> None:
        one_of("percent", self.percent, tuple(TABLES))
        check_int("min_delete", self.min_delete, 1)
        given = self.schedule
        if given is not None and (min(given, default=-1) < 0 or not 0 < sum(given) < PATCHES):
            raise SpecError(
                f"schedule={given}; expected how many tokens leave behind each layer, between 1 and "
                f"{PATCHES - 1} in all"
            )

    def cuts(self, depth: int, budget: Any, count: int) -> tuple[CutPoint, ...]:
        if budget is None:
            gone = shares_gone(self.schedule or TABLES[self.percent], depth, bool(self.schedule))
        else:
            tables = [self.schedule] if self.schedule else list(TABLES.values())
            gone = self.scaled(
                [shares_gone(table, depth, bool(self.schedule)) for table in tables],
                budget.count(count) / count,
            )
        # from shares that are gone to cuts; where too few would leave, they wait for a later layer
        points, left = [], count
        for layer in range(1, depth):
            keep = max(1, count - round(count * gone[layer]))
            if left - keep >= self.min_delete:
                left = keep
            points.append(CutPoint(layer, left, source=layer - 1))
        return tuple(points)

    def scaled(self, tables: list[tuple[float, ...]], keep: float) -> tuple[float, ...]:
        """The table whose kept share is nearest to ``keep``, made to meet it."""
        if keep == 1:
            return (0.0,) * len(tables[0])
        # what each table saves: in the end, or on average over the layers
        lost = [gone[-1] if self.final else sum(gone) / len(gone) for gone in tables]
        best = min(range(len(tables)), key=lambda number: abs(1 - lost[number] - keep))
        if not lost[best]:
            raise SpecError(
                f"schedule={self.schedule} deletes nothing that a later layer would read, so no budget can "
                "stretch it; let tokens leave behind an earlier layer"
            )
        factor = (1 - keep) / lost[best]
        # stretched so far, the table would leave no token in the last layers
        if factor * tables[best][-1] >= 1:
            least = 1 - max(share / gone[-1] for share, gone in zip(lost, tables, strict=True) if gone[-1])
            raise SpecError(
                f"keep asks fitprune for {keep:.3f} of the tokens on average over {len(tables[0])} layers, "
                f"but its schedules must stay above {least:.3f} to leave any in the end; keep more, or set "
                "final=True"
            )
        return tuple(factor * share for share in tables[best])

    def score(self, tokens: VisualTokens) -> Tensor:
        cross = cross_attention(tokens.need("text_attention"), tokens.query_mask)
        return cross * self_attention(tokens.need("lm_received"), self.causal_correction)


def cross_attention(attention: Tensor, real: Tensor | None) -> Tensor:
    """(B, N) head maximum of attention (B, H, R, N), summed over the queries that are ``real`` (B, R)."""
    M = attention.float().amax(dim=1)  # (B, R, N)
    return M.sum(dim=1) if real is None else M.masked_fill(~real[..., None], 0.0).sum(dim=1)


def self_attention(received: Tensor, causal_correction: bool = False) -> Tensor:
    """(B, N) what tokens receive (B, N) from each other, divided by the number of those that ask."""
    n = received.shape[1]
    asking = torch.full((n,), n, device=received.device)
    if causal_correction:
        # token j is seen by itself and by the later ones
        asking = n - torch.arange(n, device=received.device)
    return received.float() / asking


def shares_gone(table: tuple[int, ...], depth: int, whole: bool = False) -> tuple[float, ...]:
    """Share of the tokens that has left before each of ``depth`` layers.

    ``whole``: the table names all layers that it was fitted on.
    """
    layers = len(table) if whole else DEPTH
    gone = [0, *accumulate(table)]  # before layer 0, 1, ...
    # the layer of the table that is as deep, for models of another depth
    at = [layer * layers // depth for layer in range(depth)]
    # a published table ends with its last number that is not 0: behind it nothing more leaves
    return tuple(gone[min(where, len(gone) - 1)] / PATCHES for where in at)
