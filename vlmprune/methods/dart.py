# SPDX-License-Identifier: Apache-2.0
"""DART: keep the tokens that resemble a few pivots least, inside the language model.

Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
arXiv:2502.11494 (EMNLP 2025).

With n_i the norm of the key of token i over all key heads at layer K - 1, the pivots are the p_v visual
tokens and the p_t tokens of the text behind the picture with the largest n. With h the states that enter
layer K, through the final norm, pivot p keeps the m_p visual tokens of the smallest cos(h_p, h_i) that no
pivot before it kept; visual pivots stay, too.

Deviations: exactly ``keep`` tokens stay, m_p is (keep - p_v) / (p_v + p_t) with the remainder given to the
first pivots; pivots come by descending norm, visual ones first, where the official order is that of a Python
set of positions; norms and cosines in float32; ties go to the lower index; each picture and sample by itself;
fewer than p_t tokens of text are all pivots, where the official code fails. ``variant="official"`` has the
official order and count; ``variant="union"`` is the formula of the paper, in which no pivot minds what
another one keeps: with r_p(i) the number of tokens that are less like pivot p than token i, those with the
smallest min over p of r_p(i) stay, the earlier pivot first. ``at="input"`` applies the rule before the
language model, to embeddings in place of keys and states, as serving engines do; it is not the paper's.
Provenance: written from a description of paper and official code (commit 38d7b9c, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_int, one_of
from ..core.method import CutPoint, Method, Need, Positions, SlotName, What
from ..core.select import best_first, highest, top_k
from ..core.tokens import VisualTokens
from ..errors import SpecError
from ..registry import register


@register("dart")
@dataclass(frozen=True)
class DART(Method):
    """Layers 0 .. layer-1 read every token, all later ones those that are least like the pivots.

    Args:
        layer: first layer that reads the shortened sequence; keys of layer - 1 find the pivots (K = 2).
        visual_pivots: how many pivots are visual tokens.
        text_pivots: how many are tokens of the text behind the picture.
        norm: "l1" of the keys, which depends on the position after rotary embedding, or "l2", which does not.
        variant: "exact", or "official": the pivots in the order of a Python set of their positions, and
            p_v + (p_v + p_t) * floor(keep / (p_v + p_t)) tokens, so that 128 keeps 132; or "union": each
            pivot keeps a set of its own, and the sets grow until together they hold ``keep`` tokens.
        at: "layer", or "input": before the language model, where n_i and h_i are of the embeddings that it
            reads, and the text is the words of the question.
    """

    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4
    norm: str = "l1"
    variant: str = "exact"
    at: str = "layer"

    slot: ClassVar[SlotName] = "inside_lm"
    landing: ClassVar[tuple[str, int] | None] = ("layer", 1)
    query_aware: ClassVar[bool] = True
    nested: ClassVar[bool] = False
    positions: ClassVar[Positions] = "original"
    paper: ClassVar[str] = "arXiv:2502.11494"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("norm", self.norm, ("l1", "l2"))
        one_of("variant", self.variant, ("exact", "official", "union"))
        for name, least in (("layer", 1), ("visual_pivots", 1), ("text_pivots", 0)):
            check_int(name, getattr(self, name), least)
        one_of("at", self.at, ("layer", "input"))
        if self.at == "input":
            self._check_input()
            # on this instance alone
            object.__setattr__(self, "slot", "before_lm")

    def _check_input(self) -> None:
        """Refuse options that say nothing before the language model."""
        if self.variant == "official":
            raise SpecError(
                "variant='official' of dart orders pivots as the authors do inside the language model, and "
                "at='input' is before it; drop one of the two, e.g. dart(at=input)@128"
            )
        if self.layer != type(self).layer:
            raise SpecError(f"layer={self.layer} of dart with at='input', where no layer is cut; drop one")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        if self.at == "input":
            return Need("features"), Need("text_embeds", text="question")
        text: tuple[What, ...] = ("text_keys", "text_states")
        return Need("lm_keys"), Need("lm_states"), *(Need(what, text="question") for what in text)

    @property
    def sliding(self) -> str:  # type: ignore[override]
        others = {"norm='l2'": self.norm != "l2", "variant='exact'": self.variant == "official"}
        return ", ".join(option for option, needed in others.items() if needed)

    def cuts(self, depth: int, budget: Any, count: int) -> tuple[CutPoint, ...]:
        if budget is None:
            raise SpecError("dart needs a budget: dart@128 (tokens that go on) or dart@0.25 (fraction)")
        if self.layer >= depth:
            raise SpecError(
                f"layer={self.layer} but the language model has layers 0..{depth - 1}; choose a smaller one"
            )
        keep = budget.count(count)
        # with all tokens nothing is cut, whatever the official count would be
        if self.variant == "official" and keep < count:
            keep = official_keep(count, keep, self.visual_pivots, self.text_pivots)
        return (CutPoint(self.layer, keep, source=self.layer - 1),)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        of_layer = self.at == "layer"
        # n_i of the visual tokens, and of the text behind the picture
        n = self.norms(tokens.need("lm_keys" if of_layer else "features"))  # (B, N)
        n_text = self.norms(tokens.need("text_keys" if of_layer else "text_embeds"))  # (B, R)
        if tokens.query_mask is not None:
            # padding is no pivot
            n_text = n_text.masked_fill(~tokens.query_mask, -torch.inf)
        # the pivots alone fill the budget, so none of them picks anything
        if k <= self.visual_pivots:
            return top_k(n, k)
        # P_v and P_t, by falling norm
        P_v, P_t = best_first(n, self.visual_pivots), best_first(n_text, self.text_pivots)
        h = tokens.need("lm_states" if of_layer else "features")  # (B, N, D)
        states = torch.cat([h, tokens.need("text_states" if of_layer else "text_embeds")], dim=1)
        pivots = torch.cat([P_v, P_t + n.shape[1]], dim=1)  # (B, P) rows of the states
        # where there are fewer words than text pivots, the rest are padding at -inf
        real = torch.cat([n, n_text], dim=1).gather(1, pivots).isfinite()
        if self.variant == "official":
            order = set_order(tokens, pivots, n.shape[1])
            pivots, real = pivots.gather(1, order), real.gather(1, order)
        # visual pivots stay; those of the text are no tokens of the picture
        kept = torch.zeros_like(n, dtype=torch.bool).scatter(1, P_v, True)
        if self.variant == "union":
            return union(states, pivots, real, kept, k)
        return least_similar(states, pivots, kept, quotas(real, k - self.visual_pivots), k)

    def norms(self, keys: Tensor) -> Tensor:
        """(B, N) norm of keys (B, N, Hk, d) over all heads, or of embeddings (B, N, D)."""
        flat = keys.float().flatten(2)
        # the root is left out of "l2": the order is the same
        return flat.abs().sum(dim=-1) if self.norm == "l1" else flat.square().sum(dim=-1)


def quotas(real: Tensor, picks: int) -> Tensor:
    """(B, P) tokens that each of the real pivots (B, P) picks; the first ones pick what is left over."""
    count = real.sum(dim=1, keepdim=True)
    base, rest = picks // count, picks % count  # (B, 1) each
    # real pivots are counted from 1 on, so that the first ``rest`` of them pick one more
    first = real.cumsum(dim=1) <= rest
    return torch.where(real, base + first, 0)


def least_similar(states: Tensor, pivots: Tensor, kept: Tensor, m: Tensor, k: int) -> Tensor:
    """(B, k) tokens: those ``kept`` (B, N), and for every pivot in turn the m (B, P) others least like it.

    ``pivots`` (B, P) are rows of the states (B, N or more, D), whose first N are the tokens.
    """
    cos = cosines(states, pivots, kept.shape[1])
    # one after the other: what a pivot took is gone for the next
    for p in range(pivots.shape[1]):
        kept = kept | highest(-cos[:, p], m[:, p], ~kept)
    return top_k(kept.float(), k)


def union(states: Tensor, pivots: Tensor, real: Tensor, kept: Tensor, k: int) -> Tensor:
    """(B, k) tokens: those ``kept`` (B, N), then those that stand earliest in the list of any pivot.

    A list of one of the ``real`` pivots (B, P) has all other tokens, the least like it first. Where two lists
    are as long, the token of the earlier pivot is taken first.
    """
    # what stays already comes last in every list
    cos = cosines(states, pivots, kept.shape[1]).masked_fill(kept[:, None], torch.inf)
    place = cos.argsort(dim=2, stable=True).argsort(dim=2)  # (B, P, N) in the list of each pivot
    count = pivots.shape[1]
    # one number for place and pivot: the earlier place first, at the same place the earlier pivot
    order = place * count + torch.arange(count, device=place.device)[:, None]
    # (B, N) the best that any list says of a token; lists of pivots that are padding say nothing
    first = order.masked_fill(~real[..., None], count * kept.shape[1]).amin(dim=1)
    # whole numbers below 2**24 are exact in float32; more tokens than that no picture has
    return top_k(-first.masked_fill(kept, -1).float(), k)


def cosines(states: Tensor, pivots: Tensor, count: int) -> Tensor:
    """(B, P, N) cosines of pivots (B, P), rows of the states (B, N or more, D), and the first N rows."""
    unit = torch.nn.functional.normalize(states.float(), dim=-1)
    at = pivots[..., None].expand(-1, -1, unit.shape[-1])
    return unit.gather(1, at) @ unit[:, :count].transpose(1, 2)


def set_order(tokens: VisualTokens, pivots: Tensor, n: int) -> Tensor:
    """(B, P) order in which a Python set holds the positions of the pivots, rows of tokens and text."""
    places = torch.cat([tokens.need("positions"), tokens.need("query_positions")], dim=1)  # (B, N + R)
    found = []
    # only Python knows the order of its sets, so the positions have to come off the device
    for row in places.gather(1, pivots).tolist():
        # text that fills up a short row repeats a position; its pivots count for nothing and come last
        seen = list(set(row))
        first = [row.index(position) for position in seen]
        found.append(first + [i for i in range(len(row)) if i not in first])
    return torch.tensor(found, device=pivots.device)


def official_keep(count: int, keep: int, visual_pivots: int = 4, text_pivots: int = 4) -> int:
    """Tokens that the official code keeps of ``count`` when it is asked for ``keep``.

    Example:
        >>> official_keep(576, 128), official_keep(576, 60)
        (132, 60)
    """
    pivots = visual_pivots + text_pivots
    return visual_pivots + pivots * (max(0, min(keep, count - visual_pivots)) // pivots)
