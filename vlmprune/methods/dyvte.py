# SPDX-License-Identifier: Apache-2.0
"""DyVTE: all visual tokens leave the language model once the text has taken from them what it needs.

Wu et al., "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical
Findings", arXiv:2411.19628 (NeurIPS 2025).

Behind layer i a small gate reads the states h of the text behind the picture, T tokens long,

    f = [mean of h_1 .. h_(T-1); h_T],    z = W2 gelu(W1 f),

and the tokens are gone from layers i + 1 and later as soon as z_1 > z_0. No trained gates are published:
``weights`` reads some, ``exit`` is a fixed layer for all prompts.

Deviations: every prompt of a batch is asked by itself; there the first one decides for all. The true span, of
every picture. A prompt with less than two tokens of text behind its pictures keeps them. A later turn, and a
decode step, asks nothing.
Provenance: written from a description of paper and official code (commit b4a3396, no licence file); no code
copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_number
from ..core.method import Counts, CutPoint, Method, Positions, SlotName
from ..core.tokens import VisualTokens
from ..core.weights import Trained, read_weights
from ..errors import InvariantError, SpecError
from ..registry import register


@register("dyvte")
@dataclass(frozen=True)
class DyVTE(Method):
    """All visual tokens leave behind one layer: a fixed one, or the one where a trained gate says so.

    Args:
        exit: the last layer that reads visual tokens, counted from 0.
        weights: folder with trained gates for this model, in place of ``exit``.
        margin: they leave where z_1 - z_0 exceeds this; above 0 they stay longer. None: as the file of the
            gates says, or 0.
    """

    exit: int | None = None
    weights: str | None = None
    margin: float | None = None

    slot: ClassVar[SlotName] = "inside_lm"
    counts: ClassVar[Counts] = "own"
    positions: ClassVar[Positions] = "original"
    paper: ClassVar[str] = "arXiv:2411.19628"
    licence: ClassVar[str] = "none stated"

    def __post_init__(self) -> None:
        if self.exit is not None:
            if type(self.exit) is not int or self.exit < 0:
                raise SpecError(f"exit={self.exit!r}; expected a decoder layer from 0 on")
            if self.weights is not None:
                raise SpecError(f"exit={self.exit} and weights={self.weights!r}; give one of them")
        if self.margin is not None:
            check_number("margin", self.margin, least=-1e6, most=1e6)
        found = None if self.weights is None else read_gates(self.weights)
        object.__setattr__(self, "_trained", found)
        if found is not None:
            # the layers of ``cuts`` are places to ask then, and ``leaves`` decides
            object.__setattr__(self, "gated", True)

    @property
    def trained(self) -> Trained | None:
        """The gates, where weights were given."""
        return getattr(self, "_trained", None)

    def check_model(self, config: Any) -> None:
        if self.trained is not None:
            self.trained.check(config)

    def cuts(self, depth: int, budget: Any, count: int) -> tuple[CutPoint, ...]:
        if budget is not None:
            raise SpecError(
                f"dyvte got the budget {budget}, but all its tokens leave at once; drop '@{budget}' and "
                "choose a layer, as in dyvte(exit=15)"
            )
        if self.trained is not None:
            # behind the last layer there is nothing to save
            layers = [gate + 1 for gate in self.trained.facts["gates"] if gate + 1 < depth]
            return tuple(CutPoint(layer, 0, source=None) for layer in layers)
        if self.exit is None:
            raise SpecError(
                "dyvte decides when the tokens leave by a trained gate, and no weights of one are available; "
                "give a fixed layer, as in dyvte(exit=15), or a folder, as in dyvte(weights='DIR')"
            )
        if self.exit + 1 >= depth:
            raise SpecError(
                f"exit={self.exit}, behind which no layer is left of 0..{depth - 1}; choose at most "
                f"{depth - 2}"
            )
        # no source: all tokens leave, so nothing is ranked
        return (CutPoint(self.exit + 1, 0, source=None),)

    def leaves(self, text: Tensor, layer: int) -> Tensor:
        """(B,) bool by the gate behind the layer before: z_1 - z_0 > margin for states h (B, T, D)."""
        if self.trained is None:
            raise InvariantError("dyvte has no gates to ask; give weights")
        gates = self.trained.on(text.device)
        # the gate behind layer i decides what enters layer i + 1
        name = f"gate.{layer - 1}"
        z = gate_logits(gate_features(text.float()), gates[f"{name}.w1"], gates[f"{name}.w2"])
        margin = self.trained.facts.get("margin", 0.0) if self.margin is None else self.margin
        return z[:, 1] - z[:, 0] > margin

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        return torch.empty(tokens.batch, 0, dtype=torch.long, device=tokens.device)


def shapes_of(facts: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The tensors of the gates that a file speaks of."""
    gates = facts.get("gates")
    known = isinstance(gates, list) and all(type(gate) is int and gate >= 0 for gate in gates)
    if not known or not gates or gates != sorted({*gates}):
        raise SpecError(
            f"the file of gates says gates={gates!r}; expected ascending layers, such as [0, 1, 2]"
        )
    # W1 reads the mean and the last state side by side
    w1: dict[str, tuple[str, ...]] = {f"gate.{gate}.w1": ("width", "2D") for gate in gates}
    return w1 | {f"gate.{gate}.w2": ("2", "width") for gate in gates}


def read_gates(folder: str) -> Trained:
    """Gates from a folder, of the width of their backbone."""
    found = read_weights(folder, "dyvte", shapes_of)
    check_number(f"margin of weights={folder!r}", found.facts.get("margin", 0.0), least=-1e6, most=1e6)
    width = found.facts["backbone"].get("hidden_size")
    if found.sizes["2D"] != 2 * width:
        raise SpecError(
            f"weights={folder!r}: gates read {found.sizes['2D']} numbers; expected {2 * width}, twice the "
            "width of their backbone"
        )
    return found


def gate_features(h: Tensor) -> Tensor:
    """(B, 2D) what a gate reads of text states h (B, T, D), T >= 2: mean of all but the last, the last."""
    if h.shape[1] < 2:
        raise SpecError(f"{h.shape[1]} tokens of text behind the picture; a gate of dyvte reads at least 2")
    h = h.float()
    return torch.cat([h[:, :-1].mean(dim=1), h[:, -1]], dim=-1)


def gate_logits(f: Tensor, W1: Tensor, W2: Tensor) -> Tensor:
    """(B, 2) logits of staying and of leaving for features f (B, 2D); W1 (width, 2D), W2 (2, width)."""
    return torch.nn.functional.gelu(f @ W1.float().T) @ W2.float().T
