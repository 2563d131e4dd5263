# SPDX-License-Identifier: Apache-2.0
"""RCP's pruner: a trained correction of the attention that a layer gives its visual tokens.

Letters: B prompts, N visual tokens, R rows of the question, D width of the model, d width of the pruner, q
learned queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Weights = Mapping[str, Tensor]

# axes are the letters above
SHAPES: dict[str, tuple[str, ...]] = {
    "queries": ("q", "d"),
    "question.weight": ("d", "D"),
    "question.bias": ("d",),
    "question_norm.weight": ("d",),
    "question_norm.bias": ("d",),
    "vision.weight": ("d", "D"),
    "vision.bias": ("d",),
    "attention.query.weight": ("d", "d"),
    "attention.query.bias": ("d",),
    "attention.key.weight": ("d", "d"),
    "attention.key.bias": ("d",),
    "aggregator.weight": ("1", "q"),
    "aggregator.bias": ("1",),
    "token_in.weight": ("d", "d"),
    "token_in.bias": ("d",),
    "token_norm.weight": ("d",),
    "token_norm.bias": ("d",),
    "token_out.weight": ("1", "d"),
    "token_out.bias": ("1",),
    "keep_bias": ("1",),
}
_LEAST = 1e-6  # of the attention, whose logarithm must stay finite


@dataclass(frozen=True, eq=False)
class Scores:
    """The terms of a pruner's logits, (B, N) each; of no meaning where a token is dead.

    Args:
        baseline: b, the attention itself.
        cross: e1, by learned queries.
        token: e2, by each token alone.
        logits: their sum and a bias; above 0 a token stays.
    """

    baseline: Tensor
    cross: Tensor
    token: Tensor
    logits: Tensor


def pruner_scores(
    w: Weights,
    heads: int,
    V: Tensor,
    a: Tensor,
    c: Tensor,
    Q: Tensor,
    real: Tensor | None,
    drop: float = 0.0,
) -> Scores:
    """What a pruner with weights ``w`` says.

    Args:
        heads: of its cross-attention.
        V: (B, N, D) visual rows of the normalised input of the layer.
        a: (B, N) attention of the question to them, mean over heads and rows.
        c: (B, N) bool, tokens that are still alive.
        Q: (B, R, D) states of the question.
        real: (B, R) bool, rows of the question that are no filling; None: all.
        drop: in training, the share of learned queries and of what scores single tokens that is left out.
    """
    b = baseline(a, c)
    v = _linear(w, "vision", V)  # (B, N, d)
    q = w["queries"] + _norm(w, "question_norm", _linear(w, "question", _mean(Q, real)))[:, None]  # (B, q, d)
    attended = _attention(w, heads, q, v, c)  # (B, q, N)
    single = F.gelu(_norm(w, "token_norm", _linear(w, "token_in", v)))
    if drop:
        attended = attended * F.dropout(attended.new_ones(*attended.shape[:2], 1), drop)  # whole queries
        single = F.dropout(single, drop)
    e1 = _linear(w, "aggregator", attended.transpose(1, 2))[..., 0]
    e2 = _linear(w, "token_out", single)[..., 0]
    return Scores(b, e1, e2, b + e1 + e2 + w["keep_bias"])


def baseline(a: Tensor, c: Tensor) -> Tensor:
    """(B, N) log of the attention a (B, N), less its mean over the tokens that are alive, c (B, N)."""
    log_a = a.clamp_min(_LEAST).log()
    mean = torch.where(c, log_a, 0.0).sum(dim=1, keepdim=True) / c.sum(dim=1, keepdim=True).clamp_min(1)
    return log_a - mean


def _attention(w: Weights, heads: int, q: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """(B, q, N) softmax of q (B, q, d) over the living tokens v (B, N, d), mean over heads."""
    query = _linear(w, "attention.query", q).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, h, q, d/h)
    key = _linear(w, "attention.key", v).unflatten(-1, (heads, -1)).transpose(1, 2)
    z = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    # a finite floor: a row whose tokens are all dead stays a number
    z = z.masked_fill(~c[:, None, None], torch.finfo(z.dtype).min)
    return z.softmax(dim=-1).mean(dim=1)


def _mean(Q: Tensor, real: Tensor | None) -> Tensor:
    """(B, D) mean of the real rows of Q (B, R, D)."""
    if real is None:
        return Q.mean(dim=1)
    return torch.where(real[..., None], Q, 0.0).sum(dim=1) / real.sum(dim=1, keepdim=True).clamp_min(1)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])
