# SPDX-License-Identifier: Apache-2.0
"""MMTok: keep patches that cover the words of the question and all patches of the picture at once.

"MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", arXiv:2508.18264.
Two coverage functions are added. With P = softmax over patches of cos(word, token) / tau_t, divided by m
words, and Q = softmax over patches of cos(patch, patch) / tau_v, divided by N patches, the set S grows
greedily to raise the sum over rows r of max over j in S of C_rj, where C is P on top of alpha Q.

Deviations: the question is what follows the last picture, template words and all, because ids are known here
and strings are not: no stop words are left out; padding is chosen when nothing else is left, where the
official code repeats token 0; where a projector merges patches to a token, Q compares the tokens themselves.
Provenance: written from a description of paper and official code (commit d1522cd, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_number, one_of
from ..core.method import Method, Need, Text
from ..core.tokens import VisualTokens
from ..errors import InvariantError, SpecError, UnsupportedError
from ..kernels import dispatch
from ..registry import register
from .debias.padding import RULES, real_patches
from .pairs import check_pairs, patch_rows, unit


def text_cover(tokens: Tensor, words: Tensor, mask: Tensor | None, tau: float) -> Tensor:
    """P (B, m, N): which of the tokens x (B, N, D) stand for each word t (B, m, D), both of unit length.

    Args:
        mask: (B, m) bool, words that are real.
        tau: temperature.
    """
    p = (words @ tokens.transpose(1, 2) / tau).softmax(dim=-1)  # (B, m, N)
    if mask is None:
        return p / max(1, words.shape[1])
    # each real word has the same weight, padding none
    real = mask.to(p.dtype)
    return p * (real / real.sum(dim=1, keepdim=True).clamp_min(1))[..., None]


def picture_cover(patches: Tensor, tau: float) -> Tensor:
    """Q (B, N, N): which patches stand for each patch; rows (B, N, C) of unit length."""
    return (patches @ patches.transpose(1, 2) / tau).softmax(dim=-1) / patches.shape[1]


@register("mmtok")
@dataclass(frozen=True)
class MMTok(Method):
    """Picks token after token the one that covers most of what the question says and the picture shows.

    Args:
        alpha: weight of the picture against the question.
        text_temperature: tau_t, of the likeness between words and tokens.
        vision_temperature: tau_v, of the likeness between patches.
        text: "question", what follows the last picture, or "prompt", all words.
        pad: rule for pictures that were padded to a square, which keeps padding from being chosen: "area",
            "integer" (official) or "resize"; "none" where they were not.
        image_size: (width, height) of the pictures before padding.

    Example:
        ``vlmprune.select("mmtok", keep=64, features=x, encoder_features=patches, text_embeds=question)``
    """

    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    text: Literal["question", "prompt"] = "question"
    pad: str | None = "none"
    image_size: tuple[int, int] | None = None

    query_aware: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2508.18264"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        one_of("text", self.text, get_args(Text))
        check_number("alpha", self.alpha, 0, 1e6)
        check_number("text_temperature", self.text_temperature, 1e-6, 1e6)
        check_number("vision_temperature", self.vision_temperature, 1e-6, 1e6)
        object.__setattr__(self, "pad", self.pad or "none")  # the word none is read as None in a spec
        one_of("pad", self.pad, ("none", *RULES))
        if (self.pad == "none") != (self.image_size is None):
            raise SpecError(
                f"pad={self.pad!r} with image_size={self.image_size}; give both or none, as in "
                "mmtok(pad=integer,image_size=(640,480))"
            )
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise SpecError(
                f"image_size={self.image_size}; expected (width, height) in pixels, before padding"
            )

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return Need("features"), Need("encoder_features"), Need("text_embeds", text=self.text)

    def check_unit(self, count: int) -> None:
        check_pairs(self.name, count)

    def cover(self, tokens: VisualTokens) -> Tensor:
        """C (B, m + N, N): what words and patches each token stands for."""
        x, t = unit(tokens.need("features")), unit(tokens.need("text_embeds"))  # (B, N, D), (B, m, D)
        p = text_cover(x, t, tokens.query_mask, self.text_temperature)
        q = picture_cover(patch_rows(tokens), self.vision_temperature)
        return torch.cat([p, self.alpha * q], dim=1)  # P on top of alpha Q

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        order, gain = self.walk(self.cover(tokens), k, self.excluded(tokens))
        tokens.require(
            ~gain.isnan().any(),
            lambda: InvariantError("mmtok: tokens or words are not finite. Check them for NaN and overflow"),
        )
        return order

    @staticmethod
    @torch.no_grad()
    def walk(cover: Tensor, k: int, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Order (B, k) int64 of k picks that raise C (B, m + N, N) most, and their gains (B, k).

        Args:
            excluded: (N,) bool, tokens that are picked when no others are left, at a gain of -inf.
        """
        weight = None
        if excluded is not None:
            # (N,) 0, but -inf for tokens that come last
            last = torch.zeros(excluded.shape, device=cover.device).masked_fill(excluded, -torch.inf)
            weight = last.expand(cover.shape[0], -1)
        # a sum, since -inf times a gain of 0 would be NaN
        order, gain = dispatch.greedy_cover(cover, k, weight, "sum")
        return order.long(), gain

    def excluded(self, tokens: VisualTokens) -> Tensor | None:
        """(N,) bool, tokens that are padding; None where nothing was padded."""
        if self.pad is None or self.image_size is None:  # one of them is never given alone
            return None
        grids = tokens.need("grids")
        if len(grids) > 1 or grids[0][0] != grids[0][1]:
            raise UnsupportedError(
                f"pad={self.pad!r} is for pictures padded to one square of patches, this one has {grids}; "
                "drop it"
            )
        return ~real_patches(self.pad, grids[0][0], self.image_size).to(tokens.device)
