# SPDX-License-Identifier: Apache-2.0
"""VisionSelector: a small trained scorer of projected tokens.

With x_1 .. x_N the tokens of a picture as the language model reads them, and h the width of the scorer,

    s_i = mean over j of (W_q x_i + b_q) . (W_k x_j + b_k) / sqrt(h)
        = (W_q x_i + b_q) . (W_k x + b_k) / sqrt(h),   x the mean of the tokens

so that a score is the inner product with one direction per picture. It is trained through a soft top-k.

Deviations: the second form, in float32; the official code takes the mean of N x N products in the precision
of the model. A budget is that of a picture; there all pictures of a prompt are one set, ``@K/total``.
Provenance: arXiv:2510.16598; written from a description of the official code (commit 800a70f, no licence
file); no code copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..core.method import Method, What
from ..core.tokens import VisualTokens
from ..core.weights import Trained, read_weights, untrained
from ..errors import SpecError
from ..registry import register

# D width of the language model, h of the scorer
SHAPES = {
    "q_proj.weight": ("h", "D"),
    "q_proj.bias": ("h",),
    "k_proj.weight": ("h", "D"),
    "k_proj.bias": ("h",),
}
PREFIX = "visual.importance_scorer."  # of the names in files of the official code


@register("visionselector")
@dataclass(frozen=True)
class VisionSelector(Method):
    """Ranks tokens by a trained scorer of what the language model reads.

    Args:
        weights: folder that ``vlmprune train visionselector`` wrote for this model.

    Example:
        ``vlmprune.prune(model, "visionselector(weights='DIR')@64")``
    """

    weights: str | None = None

    needs: ClassVar[tuple[What, ...]] = ("features",)
    calibrated: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:2510.16598"
    licence: ClassVar[str] = "none stated"

    def __post_init__(self) -> None:
        found = None if self.weights is None else read_weights(self.weights, self.name, SHAPES, PREFIX)
        object.__setattr__(self, "_trained", found)

    @property
    def trained(self) -> Trained:
        """The weights, or an error that says how to train some."""
        found: Trained | None = getattr(self, "_trained", None)
        if found is None:
            raise untrained(self.name, "divprune@64")
        return found

    def check_model(self, config: Any) -> None:
        self.trained.check(config)

    def score(self, tokens: VisualTokens) -> Tensor:
        x, trained = tokens.need("features").float(), self.trained  # (B, N, D)
        if x.shape[2] != trained.sizes["D"]:
            raise SpecError(
                f"features are {x.shape[2]} wide, the weights in {self.weights!r} are of width "
                f"{trained.sizes['D']}; give features as the language model reads them"
            )
        return importance(x, trained.on(x.device))


def importance(x: Tensor, weights: Any) -> Tensor:
    """(B, N) scores s of tokens x (B, N, D) under the four tensors of a scorer."""
    W_q, b_q = weights["q_proj.weight"], weights["q_proj.bias"]
    W_k, b_k = weights["k_proj.weight"], weights["k_proj.bias"]
    # the mean of inner products is one with the mean: no N x N matrix
    key = x.mean(dim=1) @ W_k.T + b_k  # (B, h)
    # (W_q x + b_q) . key = x . (W_q^T key) + b_q . key
    along, offset = key @ W_q, key @ b_q  # (B, D) and (B,)
    return ((x @ along[..., None])[..., 0] + offset[:, None]) / W_q.shape[0] ** 0.5
