# SPDX-License-Identifier: Apache-2.0
"""Debiasing: divide the trend over places out of attention scores and rank padding last; a wrapper around
other methods.

arXiv:2508.17807 (first version under the name PoRe).

Deviations: where nothing was published or calibrated, the trend is fitted on the picture at hand; padding
ranks by its own score behind all real patches, where the official code takes it by chance or (FastV) lowers
the budget; one constant per base method, the mean over ten test sets, where the release has one for each.
Provenance: written from a description of paper and official code (commit e75ebe7, Apache-2.0); no code
copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...checks import one_of
from ...core.method import Merged, Method, act_as
from ...core.tokens import VisualTokens
from ...errors import InvariantError, SpecError, UnsupportedError
from ...registry import register
from .calibration import STEEPEST, Calibration, calibrate, check_ranks_by_attention, text_of
from .padding import RULES, real_patches

__all__ = ["Debias", "calibrate"]

TRENDS = ("auto", "constants", "self", "none")
# mean over ten test sets of the released tables, LLaVA-1.5-7B with 576 patches: the release has one value per
# set
PUBLISHED = {"pyramiddrop": 1.89, "sparsevlm": 1.94}
# the released table of FastV, one for all sets, is 1 / (1 + a s + b s^2 + c s^3) with s = 576 x
CUBIC = (3.0151976e-3, -1.4597908e-5, 2.5691135e-8)


@register("debias")
@dataclass(frozen=True)
class Debias(Method):
    """Corrects the attention scores of the method that follows, at its first cut: ``debias+fastv@64``.

    Args:
        trend: "constants" (published for pyramiddrop, sparsevlm and fastv), "self" (fitted on the scores of
            each picture), "none", or the path of a calibration file, ending in .json; "auto": "constants"
            where there are any, else "self".
        sigma: strength of an exponential trend, in place of ``trend``.
        pad: rule for pictures that were padded to a square: "area", "integer" or "resize"; "none" where they
            were not.
        image_size: (width, height) of the pictures before padding.
        threshold: share of a patch's area that may be padding, for pad="area".
    """

    inner: Method
    trend: str | None = "auto"
    sigma: float | None = None
    pad: str | None = "none"
    image_size: tuple[int, int] | None = None
    threshold: float = 0.5
    curve: str | float = field(
        init=False, repr=False
    )  # what is divided out: "none", "self", "cubic", or a sigma
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
        object.__setattr__(self, "curve", self._curve())

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

    def _curve(self) -> str | float:
        """The trend that the options ask for."""
        if self.sigma is not None:
            if self.trend != "auto":
                raise SpecError(f"trend={self.trend!r} and sigma={self.sigma} were given; give one of them")
            if not abs(self.sigma) <= STEEPEST:
                raise SpecError(
                    f"sigma={self.sigma}; expected a number from -{STEEPEST} to {STEEPEST} (0.8 to 2.7 are "
                    "published)"
                )
            return float(self.sigma)
        if self.trend.endswith(".json"):
            found = Calibration.load(self.trend)
            if found.base != text_of(self.inner):
                raise SpecError(
                    f"{self.trend!r} was calibrated for {found.base!r}, not for {text_of(self.inner)!r}; "
                    "calibrate again"
                )
            object.__setattr__(self, "calibration", found)
            return found.sigma
        one_of("trend", self.trend, (*TRENDS, "path of a .json file"))
        known: dict[str, str | float] = {**PUBLISHED, "fastv": "cubic"}
        if self.trend == "constants" and self.inner.name not in known:
            raise SpecError(
                f"no constants are published for {self.inner.name!r}, only for {sorted(known)}; use "
                "trend=self, sigma=..., or a file made by vlmprune.methods.debias.calibrate"
            )
        return known.get(self.inner.name, "self") if self.trend in ("auto", "constants") else self.trend

    @classmethod
    def kind(cls) -> str:
        return "score"  # of the class, for lists; an instance has the kind of its inner method

    def check_model(self, config: Any) -> None:
        self.inner.check_model(config)
        if self.calibration is not None:
            self.calibration.check(config, self.trend)

    def score(self, tokens: VisualTokens) -> Tensor:
        raw = self.inner.score(tokens)
        return raw if tokens.cut else self.corrected(raw.float(), tokens)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        if tokens.cut:
            return self.inner.merge(tokens, k)
        return self.inner.merge(tokens, k, ranking=self.score(tokens))

    def corrected(self, raw: Tensor, tokens: VisualTokens) -> Tensor:
        """(B, N) scores over their trend; padding stands below zero, in the order of raw (B, N)."""
        real = self._real(tokens)
        found = (raw * self.weight(raw, real)).float()
        if not bool(((raw >= 0) & found.isfinite()).all()):
            raise InvariantError(
                f"{self.inner.name} gave scores below zero or not finite, which attention cannot be; check "
                "them"
            )
        if real is None:
            return found
        place = torch.sort(0.0 - raw, dim=-1, stable=True).indices.argsort(dim=-1)  # 0 for the highest
        return torch.where(real, found, -1.0 - place)

    def weight(self, raw: Tensor, real: Tensor | None = None) -> Tensor:
        """(1 or B, N) factors for raw scores (B, N): the trend at the first patch over the trend at each."""
        x = torch.arange(raw.shape[1], dtype=torch.float64, device=raw.device)[None] / raw.shape[1]
        if self.curve == "none":
            return torch.ones_like(x)
        if self.curve == "cubic":
            (a, b, c), s = CUBIC, 576 * x
            return 1 / (1 + s * (a + s * (b + s * c)))
        sigma = own_sigma(raw, x, real) if self.curve == "self" else self.curve
        return torch.exp(-sigma * x)

    def _real(self, tokens: VisualTokens) -> Tensor | None:
        """(N,) bool, patches that are no padding."""
        if self.pad == "none":
            return None
        grids = tokens.need("grids")
        if len(grids) > 1 or grids[0][0] != grids[0][1]:
            raise UnsupportedError(
                f"pad={self.pad!r} is for pictures padded to one square of patches, this one has {grids}; "
                "drop it"
            )
        return real_patches(self.pad, grids[0][0], self.image_size, self.threshold).to(tokens.device)


def own_sigma(raw: Tensor, x: Tensor, real: Tensor | None = None) -> Tensor:
    """(B, 1) slope of the least-squares line through log raw (B, N) over x (1, N), at real patches with a
    score above zero.
    """
    used = raw > 0 if real is None else (raw > 0) & real
    y, count = torch.where(used, raw, 1.0).double().log(), used.sum(dim=1, keepdim=True).clamp_min(1)
    dx = torch.where(used, x - (x * used).sum(dim=1, keepdim=True) / count, 0.0)
    return (dx * y).sum(dim=1, keepdim=True) / dx.square().sum(dim=1, keepdim=True).clamp_min(1e-12)
