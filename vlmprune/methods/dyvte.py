# SPDX-License-Identifier: Apache-2.0
"""DyVTE: all visual tokens leave the language model once the text has taken from them what it needs.

Wu et al., "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical
Findings", arXiv:2411.19628 (NeurIPS 2025).

Behind layer i a small gate reads the states h of the text behind the picture, T tokens long,

    f = [mean of h_1 .. h_(T-1); h_T],    z = W2 gelu(W1 f),

and the tokens are gone from layers i + 1 and later as soon as z_1 > z_0. No trained gates are published. Here
the exit layer is fixed; ``gate_features`` and ``gate_logits`` are the gate alone.

Deviations: a fixed exit in place of the gate, the same for all samples of a batch; the true span, of every
picture.
Provenance: written from a description of paper and official code (commit b4a3396, no licence file); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.method import Counts, CutPoint, Method, Positions, SlotName
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register


@register("dyvte")
@dataclass(frozen=True)
class DyVTE(Method):
    """Layers 0 .. exit read every token, all later ones no visual token at all.

    Args:
        exit: the last layer that reads visual tokens, counted from 0; has to be given, because no trained
            gate is there to decide it.
    """

    exit: int | None = None

    slot: ClassVar[SlotName] = "inside_lm"
    counts: ClassVar[Counts] = "own"
    positions: ClassVar[Positions] = "original"
    paper: ClassVar[str] = "arXiv:2411.19628"
    licence: ClassVar[str] = "none stated"

    def __post_init__(self) -> None:
        if self.exit is not None and (type(self.exit) is not int or self.exit < 0):
            raise SpecError(f"exit={self.exit!r}; expected a decoder layer from 0 on")

    def cuts(self, depth: int, budget: Any, count: int) -> tuple[CutPoint, ...]:
        if budget is not None:
            raise SpecError(
                f"dyvte got the budget {budget}, but all its tokens leave at once; drop '@{budget}' and "
                "choose a layer, as in dyvte(exit=15)"
            )
        if self.exit is None:
            raise SpecError(
                "dyvte decides when the tokens leave by a trained gate, and no weights of one are available; "
                "give a fixed layer, as in dyvte(exit=15)"
            )
        if self.exit + 1 >= depth:
            raise SpecError(
                f"exit={self.exit}, behind which no layer is left of 0..{depth - 1}; choose at most "
                f"{depth - 2}"
            )
        # no source: all tokens leave, so nothing is ranked
        return (CutPoint(self.exit + 1, 0, source=None),)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        return torch.empty(tokens.batch, 0, dtype=torch.long, device=tokens.device)


def gate_features(h: Tensor) -> Tensor:
    """(B, 2D) what a gate reads of text states h (B, T, D), T >= 2: mean of all but the last, the last."""
    if h.shape[1] < 2:
        raise SpecError(f"{h.shape[1]} tokens of text behind the picture; a gate of dyvte reads at least 2")
    h = h.float()
    return torch.cat([h[:, :-1].mean(dim=1), h[:, -1]], dim=-1)


def gate_logits(f: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """(B, 2) logits of staying and of leaving for features f (B, 2D); W1 (width, 2D), W2 (2, width)."""
    return torch.nn.functional.gelu(f @ W1.float().T) @ W2.float().T
