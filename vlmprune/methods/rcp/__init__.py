# SPDX-License-Identifier: Apache-2.0
"""RCP: trained pruners take tokens out for good, and small adapters repair the answer layers later.

At a pruning layer l a pruner corrects the attention a that the question gives the visual tokens,

    logit = log a - mean(log a) + e1 + e2 + bias,    a token stays where logit > 0,

where e1 comes from learned queries that know the question, and e2 from each token alone (``pruner``). What
left stays away. At the output of a repair layer, some layers behind l, the rows that give the answer are told
what was dropped there: with m the embedding of the places that are left and p that of the mean dropped state,

    cond = m + p + C x,    x + alpha U ((1 + G cond) * gelu(W x) + F cond)

(``repair``). Both are trained with the backbone frozen, for the answers, for rows like those of the dense
model, and for a share of tokens (``losses``).

Deviations: a budget K is the mean over all layers of the tokens that are read, and the same logits rank; its
shares per layer are those of the training, drawn together or apart. Tokens that left earlier are not there
any more, so that p is about those that leave at l. Several pictures of a prompt are pruned one by one, and
their contexts averaged. A picture keeps at least its best token.
Provenance: arXiv:2604.04972; from a description of the abstract and of a public repository that is very
probably the authors', which nothing confirms (no licence file); no code copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.budget import Budget
from ...core.method import Counts, CutPoint, Method, Need, Positions, SlotName
from ...core.tokens import VisualTokens
from ...core.weights import Trained, read_weights, untrained
from ...errors import SpecError
from ...registry import register
from .losses import lengths_of
from .pruner import SHAPES, Scores, pruner_scores
from .repair import CONTEXT_SHAPES, REPAIR_SHAPES, dropped_embedding, mask_embedding, repaired


@register("rcp")
@dataclass(frozen=True)
class RCP(Method):
    """Prunes by trained pruners at several layers, and repairs the rows that answer.

    Args:
        weights: folder that ``vlmprune train rcp`` wrote for this model.
        mend: whether answers are repaired; False shows what the repair is worth.

    Example:
        ``vlmprune.prune(model, "rcp(weights='DIR')")``, or with a budget ``"rcp(weights='DIR')@64"``
    """

    weights: str | None = None
    mend: bool = True

    slot: ClassVar[SlotName] = "inside_lm"
    counts: ClassVar[Counts] = "both"
    query_aware: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    nested: ClassVar[bool] = False  # later pruners read layers that saw other tokens
    repairs: ClassVar[bool] = True
    positions: ClassVar[Positions] = "original"
    needs: ClassVar[tuple[Need, ...]] = (
        Need("text_attention", text="question"),
        Need("layer_inputs"),
        Need("text_inputs", text="question"),
    )
    paper: ClassVar[str] = "arXiv:2604.04972"
    licence: ClassVar[str] = "none stated"

    def __post_init__(self) -> None:
        found = None if self.weights is None else read_weights(self.weights, self.name, shapes_of)
        object.__setattr__(self, "_trained", found)

    @property
    def trained(self) -> Trained:
        """The weights, or an error that says how to train some."""
        found: Trained | None = getattr(self, "_trained", None)
        if found is None:
            raise untrained(self.name, "pyramiddrop@0.5")
        return found

    @property
    def layers(self) -> list[int]:
        """Layers that prune."""
        found: list[int] = self.trained.facts["layers"]
        return found

    def check_model(self, config: Any) -> None:
        self.trained.check(config)

    def cuts(self, depth: int, budget: Budget | None, count: int) -> tuple[CutPoint, ...]:
        # without a budget the pruners say how many of all tokens go on
        shares = [1.0] * len(self.layers)
        if budget is not None:
            shares = shares_at(self.trained.facts["shares"], self.layers, depth, budget.count(count) / count)
        keeps = [max(1, int(count * share)) for share in shares]
        return tuple(
            CutPoint(layer, keep, source=layer) for layer, keep in zip(self.layers, keeps, strict=True)
        )

    def scores(self, tokens: VisualTokens) -> Scores:
        """What the pruner of the layer that is cut says of its tokens."""
        attention = tokens.need("text_attention").float().mean(dim=1)  # (B, R, N)
        real = tokens.query_mask
        # a: mean over the words that are real
        if real is None:
            a = attention.mean(dim=1)
        else:
            a = torch.where(real[..., None], attention, 0.0).sum(dim=1) / real.sum(dim=1, keepdim=True)
        V, Q = tokens.need("layer_inputs").float(), tokens.need("text_inputs").float()
        every = torch.ones(a.shape, dtype=torch.bool, device=a.device)  # the dead are not here any more
        w = part_of(self.trained.on(a.device), f"pruner.{self.layers[tokens.cut]}.")
        return pruner_scores(w, self.trained.facts["heads"], V, a, every, Q, real)

    def score(self, tokens: VisualTokens) -> Tensor:
        return self.scores(tokens).logits

    def own(self, tokens: VisualTokens) -> Tensor:
        logits = self.scores(tokens).logits
        best = logits.argmax(dim=1, keepdim=True)  # of no use where any other stays
        return (logits > 0).scatter(1, best, True)

    def repairs_on(self, depth: int) -> Mapping[int, int]:
        return dict(self.trained.facts["repairs"]) if self.mend else {}

    def repair_context(self, alive: Tensor, dropped: Tensor) -> Tensor:
        w = part_of(self.trained.on(dropped.device), "context.")
        # the mean of what left is given as one dropped state
        states, gone = dropped[:, None].float(), torch.ones(len(dropped), 1, dtype=torch.bool)
        return mask_embedding(w, alive.float()) + dropped_embedding(w, states, gone.to(dropped.device))

    def repair(self, layer: int, rows: Tensor, context: Tensor) -> Tensor:
        w = part_of(self.trained.on(rows.device), f"repair.{layer}.")
        return repaired(w, rows.float(), context)


def part_of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): one for name, one in weights.items() if name.startswith(prefix)}


def shapes_of(facts: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The tensors that a file with these layers and repairs has."""
    layers, pairs, shares = facts.get("layers"), facts.get("repairs"), facts.get("shares")
    numbers = isinstance(layers, list) and all(type(one) is int and one >= 0 for one in layers)
    if not numbers or not layers or layers != sorted({*layers}):
        raise SpecError(
            f"the file of rcp says layers={layers!r}; expected ascending layers, as in [4, 14, 24]"
        )
    if not isinstance(shares, list) or len(shares) != len(layers) or not all(0 < one <= 1 for one in shares):
        raise SpecError(
            f"the file of rcp says shares={shares!r}; expected one in (0, 1] for each of {layers}"
        )
    paired = isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if (
        not isinstance(pairs, list)
        or not paired
        or any(source not in layers or layer < source for layer, source in pairs)
    ):
        raise SpecError(
            f"the file of rcp says repairs={pairs!r}; expected pairs of a layer and the pruning layer of "
            f"{layers} before it"
        )
    if type(facts.get("heads")) is not int or facts["heads"] < 1:
        raise SpecError(f"the file of rcp says heads={facts.get('heads')!r}; expected a number from 1 on")
    # a pruner for each layer, one context for all, a repair for each pair
    found = {f"pruner.{layer}.{name}": axes for layer in layers for name, axes in SHAPES.items()}
    found |= {f"context.{name}": axes for name, axes in CONTEXT_SHAPES.items()}
    return found | {
        f"repair.{layer}.{name}": axes for layer, _ in pairs for name, axes in REPAIR_SHAPES.items()
    }


def shares_at(trained: list[float], layers: list[int], depth: int, mean: float) -> list[float]:
    """Shares in the proportions of the trained ones, at most 1, whose mean over all layers is ``mean``."""
    first, *rest = lengths_of(layers, depth)
    if mean <= first / depth:
        raise SpecError(
            f"keep asks for {mean:.3f} of the tokens on average over the layers, but layers 0..{first - 1} "
            f"of {depth} read all of them, which is {first / depth:.3f} already; keep more"
        )
    low, high = 0.0, 1.0 / min(trained)  # there all shares are 1
    # bisection: the mean grows with the factor, and a float has no digits for more halvings
    for _ in range(60):
        factor = (low + high) / 2
        shares = [min(1.0, factor * share) for share in trained]
        reached = (first + sum(n * share for n, share in zip(rest, shares, strict=True))) / depth
        low, high = (factor, high) if reached < mean else (low, factor)
    return [min(1.0, high * share) for share in trained]
