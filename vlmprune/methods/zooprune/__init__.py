# SPDX-License-Identifier: Apache-2.0
"""ZOO-Prune: keep tokens that the language model's input is sensitive to and that differ from those kept.

A token matters if moving it a little moves what the language model receives. The projector alone is probed
for that, and the greedy choice multiplies it with the distance to what is chosen already.

    S_i   = mean_j |M(x_i + h u_j) - M(x_i - h u_j)| / 2h      "zo"; other estimators are in sensitivity.py
    s_i   = (S_i - min S) / (max S - min S)
    first = argmax_i s_i
    next  = argmax_i s_i (1 - max over picked j of cos(z_i, z_j)), i not picked

with M the projector, x_i a patch as M takes it, z_i = M(x_i), and m unit directions u_j shared by all tokens.

Deviations: the projector is probed in float32 with seeded directions, where the official code uses half
precision and no seed; sensitivities that differ by rounding only, as with a linear projector, count as equal;
the estimators "jvp", "exact" and "norm" are ours, and "exact" is the default (the card says why).
Provenance: "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language
Models", arXiv:2509.24837; written from a description of paper and official code (no licence file, Apache-2.0
headers); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...checks import check_int, check_positive, one_of
from ...core.method import Method, What
from ...core.tokens import VisualTokens
from ...errors import InvariantError
from ...kernels import dispatch
from ...registry import register
from .cache import Compared
from .sensitivity import closed_form, directional, finite_difference, unit_directions

ESTIMATORS = ("zo", "jvp", "exact", "norm")
_CONSTANT = 1e-4  # relative spread below which sensitivities differ by rounding only


def scaled(S: Tensor) -> Tensor:
    """(B, N) s, sensitivities S (B, N) stretched to [0, 1] in every row; all ones where a row is constant."""
    return dispatch.stretch(S, _CONSTANT)


@torch.no_grad()
def hybrid_greedy(s: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """First the largest s, then k - 1 times the largest s * (1 - largest cosine to those picked).

    Args:
        s: (B, N).
        features: (B, N, D).
        k: number of picks.

    Returns:
        order (B, k) int64 in the order of picking, and what each pick was worth (B, k).
    """
    if features.shape[:2] != s.shape or not 1 <= k <= s.shape[1]:
        shapes = f"{tuple(s.shape)} and {tuple(features.shape)}"
        raise InvariantError(
            f"cannot pick {k} by weights and features of shapes {shapes}; expected (B, N), (B, N, D) and "
            "1 <= k <= N"
        )
    # a zero vector stays zero: distance 1 to all
    z = torch.nn.functional.normalize(features.to(s.dtype), dim=-1)  # (B, N, D)
    order, worth = dispatch.greedy_maxmin_features(z, k, s, first="argmax")
    return order.long(), worth


@register("zooprune")
@dataclass(frozen=True)
class ZOOPrune(Method):
    """Greedy choice by sensitivity of the projector times distance to what is chosen.

    Neither attention nor text is needed. Budgets are per image, one run over all its tokens; the paper's rule
    for tiled images, an equal share and a run of its own for every tile, is ``zooprune@0.111/crop``.

    Args:
        estimator: "exact": length of the projector's Jacobian; "zo": the paper's finite differences along
            random directions; "jvp": derivatives along the same directions; "norm": ablation, the length of
            the projected token.
        m: directions of "zo" and "jvp".
        h: step of "zo".
        rank: both matrices of the projector are cut to this rank (official for LLaVA-NeXT: 128); None: full.
        seed: of the directions.
    """

    estimator: str = "exact"
    m: int = 64
    h: float = 0.01
    rank: int | None = None
    seed: int = 0
    compared: Compared = field(init=False, repr=False, compare=False, default_factory=Compared)

    paper: ClassVar[str] = "arXiv:2509.24837"
    licence: ClassVar[str] = "no licence file; Apache-2.0 headers"

    def __post_init__(self) -> None:
        one_of("estimator", self.estimator, ESTIMATORS)
        check_int("m", self.m, least=1, most=2**32 - 1)
        check_positive("h", self.h)
        if self.rank is not None:
            check_int("rank", self.rank, least=1)
        check_int("seed", self.seed, least=0, most=2**32 - 1)

    @property
    def needs(self) -> tuple[What, ...]:  # type: ignore[override]
        return ("features",) if self.estimator == "norm" else ("features", "encoder_features", "projector")

    def sensitivity(self, tokens: VisualTokens) -> Tensor:
        """(B, N) sensitivities S."""
        if self.estimator == "norm":
            return tokens.need("features").float().norm(dim=-1)
        x, M = tokens.need("encoder_features"), tokens.need("projector")  # x: (B, N, C)
        if self.estimator == "exact":
            return closed_form(M, x, self.rank, self.compared)
        u = unit_directions(self.m, x.shape[-1], self.seed)  # (m, C)
        if self.estimator == "jvp":
            return directional(M, x, u, self.rank, self.compared)
        return finite_difference(M, x, u, self.h, self.rank, self.compared)

    def score(self, tokens: VisualTokens) -> Tensor:
        """(B, N) scaled sensitivities; the choice weighs them with diversity."""
        return scaled(self.sensitivity(tokens))

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        z = tokens.need("features")  # (B, N, D)
        order, worth = hybrid_greedy(self.score(tokens), z, k)
        # a sensitivity that is not finite spoils its row, but a token without a direction ranks last: the
        # picks alone would not show it
        for values in (z, worth):
            tokens.require_finite(values, self._not_finite)
        return order

    def _not_finite(self) -> InvariantError:
        return InvariantError(
            f"{self.name}: sensitivities or distances are not finite. Check the features for NaN and overflow"
        )
