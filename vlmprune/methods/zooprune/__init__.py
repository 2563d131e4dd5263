# SPDX-License-Identifier: Apache-2.0
"""ZOO-Prune: keep tokens to which the language model's input is sensitive and which differ from those kept
already.

"ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
arXiv:2509.24837.

Deviations: the projector is probed in float32 with seeded directions, where the official code uses half
precision and no seed; sensitivities that differ by rounding only, as with a linear projector, count as equal;
the estimators "jvp", "exact" and "norm" are ours.
Provenance: written from a description of paper and official code (no licence file, Apache-2.0 headers); no
code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import one_of
from ...core.method import Method, What
from ...core.tokens import VisualTokens
from ...errors import InvariantError, SpecError
from ...kernels import dispatch
from ...registry import register
from .projector import closed_form, directional, finite_difference, unit_directions

ESTIMATORS = ("zo", "jvp", "exact", "norm")
_CONSTANT = 1e-4  # relative spread below which sensitivities differ by rounding only


def scaled(sensitivity: Tensor) -> Tensor:
    """(B, N) sensitivities stretched to [0, 1] in every row; all ones where a row is constant."""
    low, high = sensitivity.amin(-1, keepdim=True), sensitivity.amax(-1, keepdim=True)
    constant = high - low <= _CONSTANT * high
    return torch.where(constant, torch.ones_like(sensitivity), (sensitivity - low) / (high - low + 1e-8))


@torch.no_grad()
def hybrid_greedy(weight: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """First the largest weight, then k - 1 times the largest weight * (1 - largest cosine to the tokens
    picked so far).

    Args:
        weight: (B, N).
        features: (B, N, D).
        k: number of picks.

    Returns:
        order (B, k) int64 in the order of picking, and what each pick was worth (B, k).
    """
    n = weight.shape[1]
    if features.shape[:2] != weight.shape or not 1 <= k <= n:
        shapes = f"{tuple(weight.shape)} and {tuple(features.shape)}"
        raise InvariantError(
            f"cannot pick {k} by weights and features of shapes {shapes}; expected (B, N), (B, N, D) and 1 "
            "<= k <= N"
        )
    unit = torch.nn.functional.normalize(
        features.to(weight.dtype), dim=-1
    )  # a zero vector stays zero: distance 1 to all
    order, worth = dispatch.greedy_maxmin_features(unit, k, weight, first="argmax")
    return order.long(), worth


@register("zooprune")
@dataclass(frozen=True)
class ZOOPrune(Method):
    """Greedy choice by sensitivity of the projector times distance to what is chosen. No attention, no text.

    Budgets are per image, one run over all its tokens; the paper's rule for tiled images, an equal share and
    a run of its own for every tile, is scope crop: ``zooprune@0.111/crop``.

    Args:
        estimator: "exact": length of the projector's Jacobian; "zo": the paper's finite differences along
            random directions; "jvp": derivatives along the same directions; "norm": ablation, the length of
            the projected token.
        m: directions of "zo" and "jvp".
        h: step of "zo".
        rank: probe a projector whose two matrices are cut to this rank (official for LLaVA-NeXT: 128); None:
            the full one.
        seed: of the directions.
    """

    estimator: str = "exact"
    m: int = 64
    h: float = 0.01
    rank: int | None = None
    seed: int = 0

    paper: ClassVar[str] = "arXiv:2509.24837"
    licence: ClassVar[str] = "no licence file; Apache-2.0 headers"

    def __post_init__(self) -> None:
        one_of("estimator", self.estimator, ESTIMATORS)
        for name, least in (("m", 1), ("rank", 1), ("seed", 0)):
            value = getattr(self, name)
            if not (name == "rank" and value is None) and (
                type(value) is not int or not least <= value < 2**32
            ):
                raise SpecError(
                    f"{name}={value!r}; expected an integer from {least} to 2**32 - "
                    f"1{' or None' * (name == 'rank')}"
                )
        if type(self.h) not in (int, float) or not 0 < self.h < float("inf"):
            raise SpecError(f"h={self.h!r} is not a step; expected a positive number such as 0.01")

    @property
    def needs(self) -> tuple[What, ...]:  # type: ignore[override]
        return ("features",) if self.estimator == "norm" else ("features", "encoder_features", "projector")

    def sensitivity(self, tokens: VisualTokens) -> Tensor:
        """(B, N) sensitivities before scaling."""
        if self.estimator == "norm":
            return tokens.need("features").float().norm(dim=-1)
        x, projector = tokens.need("encoder_features"), tokens.need("projector")
        if self.estimator == "exact":
            return closed_form(projector, x, self.rank)
        directions = unit_directions(self.m, x.shape[-1], self.seed)
        if self.estimator == "jvp":
            return directional(projector, x, directions, self.rank)
        return finite_difference(projector, x, directions, self.h, self.rank)

    def score(self, tokens: VisualTokens) -> Tensor:
        """(B, N) scaled sensitivities; the choice weighs them with diversity."""
        return scaled(self.sensitivity(tokens))

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        sensitivity, features = self.sensitivity(tokens), tokens.need("features")
        order, worth = hybrid_greedy(scaled(sensitivity), features, k)
        # a token without a number ranks last: the picks alone would not show it
        if not bool(
            torch.isfinite(sensitivity).all() & torch.isfinite(features).all() & torch.isfinite(worth).all()
        ):
            raise InvariantError(
                f"{self.name}: sensitivities or distances are not finite. Check the features for NaN and "
                "overflow"
            )
        return order
