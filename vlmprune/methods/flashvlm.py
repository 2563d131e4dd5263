# SPDX-License-Identifier: Apache-2.0
"""FlashVLM: VisPruner whose ranking also asks how like a patch is to the words of the prompt.

A patch counts by the geometric mean of the attention of [CLS] and its likeness to the prompt, measured in the
space of the language model's input embeddings. With p_i a patch behind the projector and e_l a word, both of
length one, a the attention (mean over heads) and u = min-max(v) = (v - min v) / (max v - min v + eps):

    s_i = sum over l of softmax_l(p_i . e_l / 0.05) p_i . e_l
    s = u(softmax_i(s / 0.01) ^ 2.5);   s_i = 0.1 s_i where s_i < quantile(s, 0.995);   s = u(s)
    score = u(exp((1 - eta) ln max(u(a), eps) + eta ln max(s, eps)))

The floor(T r) highest scores are kept, and of the others those without a near twin, as in VisPruner; with
eta = 0 both keep the same. Only a few patches are lifted by the text: nearly all s fall below eps.

Deviations: the gate by the norms of the words, which the LLaVA file applies to rows of length one, is left
out; the Qwen file, whose text ends before the picture and so before the question, is not followed:
``text="prompt"`` is all words of the prompt and ``"question"`` those behind the last picture. Float32.
Provenance: Cai et al., arXiv:2512.20561; written from a description of the abstract and of the official code
(commit e1a80e8, MIT); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..checks import check_int, check_number, one_of
from ..core.budget import share_of
from ..core.method import Method, Need
from ..core.select import ranked
from ..core.tokens import VisualTokens
from ..registry import register
from .pairs import check_pairs
from .tower import check_tower_options
from .vispruner import side_by_side, without_twins

EPS = 1e-6


def unit_range(v: Tensor) -> Tensor:
    """(B, N) numbers moved to 0..1 in every row."""
    low, high = v.aminmax(dim=1, keepdim=True)
    return (v - low) / (high - low + EPS)


def likeness(p: Tensor, e: Tensor, real: Tensor | None, temperature: float) -> Tensor:
    """(B, N) how like patches (B, N, D) are to words (B, R, D), of which some are ``real`` (B, R)."""
    s = normalize(p.float(), dim=-1) @ normalize(e.float(), dim=-1).transpose(1, 2)  # (B, N, R)
    if real is None:
        return ((s / temperature).softmax(dim=-1) * s).sum(dim=-1)
    words = real[:, None]
    weights = (s / temperature).masked_fill(~words, -torch.inf).softmax(dim=-1)
    return torch.where(words, weights * s, 0.0).sum(dim=-1)  # 0 where no word is real


@register("flashvlm")
@dataclass(frozen=True)
class FlashVLM(Method):
    """Ranks by attention and by likeness to the prompt; half of the budget goes to patches without a twin.

    Args:
        eta: weight of the text, from 0 (attention alone) to 1.
        important: share of the budget for the highest scores.
        text_temperature: of the softmax over words; a low one looks at the likest word.
        sharpen_temperature: of the softmax over patches.
        gamma: power that follows it.
        top_p: share of patches that the text lifts in full.
        dim: factor of the others.
        step: patches that are taken out in one round.
        text: "prompt": all words, or "question": those behind the last picture.
        cls: "token", or "mean": the attention a patch receives from all patches, for towers without [CLS].
        layer: index into the hidden states of the tower, such as -2; None: the layer the model takes its
            features from.
    """

    eta: float = 0.5
    important: float = 0.5
    text_temperature: float = 0.05
    sharpen_temperature: float = 0.01
    gamma: float = 2.5
    top_p: float = 0.005
    dim: float = 0.1
    step: int = 8
    text: str = "prompt"
    cls: str = "token"
    layer: int | None = None

    query_aware: ClassVar[bool] = True
    nested: ClassVar[bool] = False
    paper: ClassVar[str] = "arXiv:2512.20561"
    licence: ClassVar[str] = "MIT"

    def __post_init__(self) -> None:
        for name in ("eta", "important", "top_p", "dim"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("text_temperature", "sharpen_temperature", "gamma"):
            check_number(name, getattr(self, name), 1e-4, 1e4)
        check_int("step", self.step, 1)
        one_of("text", self.text, ("prompt", "question"))
        check_tower_options(self.cls, self.layer, "unpad")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        attention = Need("cls_attention" if self.cls == "token" else "received_attention", self.layer)
        text = Need("text_embeds", text="question" if self.text == "question" else "prompt")
        return attention, Need("encoder_features"), Need("features"), text

    def check_unit(self, count: int) -> None:
        check_pairs(self.name, count)

    def relevance(self, tokens: VisualTokens) -> Tensor:
        """(B, N) from 0 to 1, how much the text lifts each patch; without text it lifts none."""
        p, e = tokens.need("features"), tokens.need("text_embeds")
        if not e.shape[1]:
            return p.new_zeros(p.shape[:2], dtype=torch.float32)
        s = likeness(p, e, tokens.query_mask, self.text_temperature)
        # sharpened: few patches are near 1, nearly all near 0
        s = unit_range((s / self.sharpen_temperature).softmax(dim=1) ** self.gamma)
        # the highest keep their s, the others are dimmed
        lifted = s >= torch.quantile(s, 1 - self.top_p, dim=1, keepdim=True)
        return unit_range(torch.where(lifted, s, self.dim * s))

    def fused(self, tokens: VisualTokens) -> Tensor:
        """(B, N) score: geometric mean of attention and relevance."""
        if self.cls == "mean":
            a = tokens.need("received_attention").float()
        else:
            a = tokens.need("cls_attention").float().mean(1)  # (B, H, N) -> (B, N)
        # a geometric mean by logarithms: a zero on either side would make -inf
        a, s = unit_range(a).clamp_min(EPS), self.relevance(tokens).clamp_min(EPS)
        return unit_range(torch.exp((1 - self.eta) * a.log() + self.eta * s.log()))

    def halves(self, tokens: VisualTokens, k: int) -> tuple[Tensor, Tensor]:
        """(B, T_imp) patches by score, best first, and (B, T_div) diverse ones as the rounds leave them."""
        order, first = ranked(self.fused(tokens)), share_of(k, self.important)
        features = side_by_side(tokens.need("encoder_features"), tokens.count)
        # as in VisPruner, with the fused score in place of attention
        return order[:, :first], without_twins(features, order[:, first:], k - first, self.step)

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        return torch.cat(self.halves(tokens, k), dim=1)
