# SPDX-License-Identifier: Apache-2.0
"""The trend of attention over the places of patches: published curves, one fitted on a picture, the weights.

    f(x) = mu exp(sigma x),   w_i = f(0) / f(i / N) = exp(-sigma i / N)

with i the place of a patch among N in raster order. Some curves are other than exponential.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...checks import check_number, one_of
from ...errors import InvariantError, SpecError
from ...kernels import dispatch

Curve = Literal["none", "self", "cubic"] | float  # a number is sigma

STEEPEST = 20  # sigma; published ones are 0.8 to 2.7, steeper ones follow a single peak
# sigma, mean over ten test sets of the released tables, LLaVA-1.5-7B with 576 patches: the release has one
# value per set
PUBLISHED = {"pyramiddrop": 1.89, "sparsevlm": 1.94}
# the released table of FastV, one for all sets, is 1 / (1 + a s + b s^2 + c s^3) with s = 576 x
CUBIC = (3.0151976e-3, -1.4597908e-5, 2.5691135e-8)


def check_sigma(sigma: float) -> None:
    """Raise where no attention rises or falls so steeply."""
    check_number("sigma", sigma, least=-STEEPEST, most=STEEPEST)


def named_curve(trend: str, base: str) -> Curve:
    """The curve that a word asks for around the method of this name."""
    one_of("trend", trend, ("auto", "constants", "self", "none", "path of a .json file"))
    known: dict[str, Curve] = {**PUBLISHED, "fastv": "cubic"}
    if trend == "constants" and base not in known:
        raise SpecError(
            f"no constants are published for {base!r}, only for {sorted(known)}; use trend=self, sigma=..., "
            "or a file made by vlmprune.methods.debias.calibrate"
        )
    if trend == "none":
        return "none"
    return "self" if trend == "self" else known.get(base, "self")


def weights(curve: Curve, n: int, device: torch.device | None = None) -> Tensor:
    """(1, N) weights w of n places, where the curve does not depend on scores."""
    # x = i / N, (1, N)
    x = torch.arange(n, dtype=torch.float64, device=device)[None] / n
    if curve == "none":
        return torch.ones_like(x)
    if curve == "cubic":
        (c1, c2, c3), s = CUBIC, 576 * x
        return 1 / (1 + s * (c1 + s * (c2 + s * c3)))
    if curve == "self":
        raise InvariantError("the curve 'self' is fitted on scores; expected a number, 'cubic' or 'none'")
    return torch.exp(-curve * x)


def divided(curve: Curve, a: Tensor, real: Tensor | None = None) -> Tensor:
    """(B, N) float32 scores a (B, N) times w, NaN where a is below zero.

    For "self", log f is the least-squares line of log a over x, where a is above zero; padding, where
    ``real`` (N,) is false, takes no part.
    """
    if curve == "self":
        return dispatch.detrend(a, real)
    return torch.where(a < 0, torch.nan, (a * weights(curve, a.shape[1], a.device)).float())
