# SPDX-License-Identifier: Apache-2.0
"""Debiasing: divide the positional trend out of attention scores and rank padding last, around other methods.

Attention from the text to the picture rises towards the end of the raster, a habit of the language model, and
padding draws attention that means nothing. Both are factors of the score.

    f(x) = mu exp(sigma x),   w_i = f(0) / f(i / N) = exp(-sigma i / N),   a'_i = a_i w_i m_i

with a the scores of the wrapped method, i the place of a patch among N, and m_i = 0 for padding, else 1.

Deviations: where nothing was published or calibrated, the trend is fitted on the picture at hand; padding
ranks by its own score after all real patches, where the official code takes it by chance or (FastV) lowers
the budget; one constant per base method, the mean over ten test sets, where the release has one for each.
Provenance: arXiv:2508.17807 (first version under the name PoRe); written from a description of paper and
official code (commit e75ebe7, Apache-2.0); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import one_of
from ...core.combine import act_as
from ...core.method import Merged, Method, Verb
from ...core.tokens import VisualTokens
from ...errors import InvariantError, SpecError, UnsupportedError
from ...registry import register
from .calibration import Calibration, calibrate, check_ranks_by_attention, text_of
from .padding import RULES, real_patches
from .trend import Curve, check_sigma, divided, named_curve

__all__ = ["Debias", "calibrate"]


@register("debias")
@dataclass(frozen=True)
class Debias(Method):
    """Corrects the attention scores of the method that follows, at its first cut: ``debias+fastv@64``.

    Args:
        trend: "constants" (published for pyramiddrop, sparsevlm and fastv), "self" (fitted on the scores of
            each picture), "none", or the path of a calibration file, ending in .json; "auto": "constants"
            where there are any, else "self".
        sigma: strength of an exponential trend, in place of ``trend``.
        pad: rule for pictures that were padded to a square: "area", "integer" or "resize"; else "none".
        image_size: (width, height) of the pictures before padding.
        threshold: share of a patch's area that may be padding, for pad="area".
    """

    inner: Method
    trend: str | None = "auto"
    sigma: float | None = None
    pad: str | None = "none"
    image_size: tuple[int, int] | None = None
    threshold: float = 0.5
    curve: Curve = field(init=False, repr=False)  # what is divided out
    calibration: Calibration | None = field(init=False, repr=False, default=None)

    wraps: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2508.17807"
    licence: ClassVar[str] = "Apache-2.0"

    def __post_init__(self) -> None:
        check_ranks_by_attention(self.inner)
        act_as(self, self.inner)
        for option in ("trend", "pad"):  # the word none is read as None in a spec
            object.__setattr__(self, option, getattr(self, option) or "none")
        self._check_padding()
        object.__setattr__(self, "curve", self._curve(self.trend or "none"))

    def _check_padding(self) -> None:
        one_of("pad", self.pad, ("none", *RULES))
        if (self.pad == "none") != (self.image_size is None):
            raise SpecError(
                f"pad={self.pad!r} with image_size={self.image_size}; give both or none, as in "
                "debias(pad=area,image_size=(640,480))"
            )
        if self.image_size is not None and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise SpecError(
                f"image_size={self.image_size}; expected (width, height) in pixels, before padding"
            )
        if not 0 <= self.threshold < 1:
            raise SpecError(
                f"threshold={self.threshold}; expected a share of a patch's area, from 0 to below 1"
            )

    def _curve(self, trend: str) -> Curve:
        """The curve that the options ask for."""
        if self.sigma is not None:
            if trend != "auto":
                raise SpecError(f"trend={trend!r} and sigma={self.sigma} were given; give one of them")
            check_sigma(self.sigma)
            return float(self.sigma)
        if not trend.endswith(".json"):
            return named_curve(trend, self.inner.name)
        found, inner = Calibration.load(trend), text_of(self.inner)
        if found.base != inner:
            raise SpecError(
                f"{trend!r} was calibrated for {found.base!r}, not for {inner!r}; calibrate again"
            )
        object.__setattr__(self, "calibration", found)
        return found.sigma

    @classmethod
    def kind(cls) -> Verb:
        return "score"  # of the class, for lists; an instance has the kind of its inner method

    def check_model(self, config: Any) -> None:
        self.inner.check_model(config)
        if self.calibration is not None:
            self.calibration.check(config, str(self.trend))

    def score(self, tokens: VisualTokens) -> Tensor:
        a = self.inner.score(tokens)  # (B, N)
        # behind the first cut, the number of a token says no more where it stood in the picture
        return a if tokens.cut else self.corrected(a.float(), tokens)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        if tokens.cut:
            return self.inner.merge(tokens, k)
        # the inner method says how it merges, the corrected scores only which tokens it keeps
        return self.inner.merge_ranked(tokens, k, ranking=self.score(tokens))

    def corrected(self, a: Tensor, tokens: VisualTokens) -> Tensor:
        """(B, N) scores a (B, N) without their trend; padding ranks last."""
        m = self.real(tokens)  # (N,)
        found = divided(self.curve, a, m)
        tokens.require_finite(
            found,
            lambda: InvariantError(
                f"{self.inner.name} gave scores below zero or not finite, which attention cannot be; check "
                "them"
            ),
        )
        # attention is never negative: padding comes behind all real patches, and keeps its own order
        return found if m is None else torch.where(m, found, below_zero(a))

    def real(self, tokens: VisualTokens) -> Tensor | None:
        """(N,) bool, patches that are not padding; None: all of them."""
        if self.pad == "none" or self.pad is None or self.image_size is None:
            return None
        grids = tokens.need("grids")
        if len(grids) > 1 or grids[0][0] != grids[0][1]:
            raise UnsupportedError(
                f"pad={self.pad!r} is for pictures padded to one square of patches, this one has {grids}; "
                "drop it"
            )
        return real_patches(self.pad, grids[0][0], self.image_size, self.threshold).to(tokens.device)


def below_zero(a: Tensor) -> Tensor:
    """(B, N) -1, -2, ... in the order of scores a (B, N), -1 for the best."""
    order = torch.sort(0.0 - a, dim=-1, stable=True).indices
    # argsort of an order is the rank of each token
    return -1.0 - order.argsort(dim=-1)
