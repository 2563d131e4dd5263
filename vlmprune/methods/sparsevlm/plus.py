# SPDX-License-Identifier: Apache-2.0
"""What SparseVLM+ changes of the score: a bias of rotary embedding is divided out, and only some heads count.

    A'[h, j, i] = A[h, j, i] / w(|p_j - p_i|),   w(D) = 2 / sqrt(d) sum_f cos(D f)

with p positions, f the angles per position of the pairs of a head of width d. w is the logit of all-ones
queries and keys. Heads count in the order of the attention that raters give to all patches.
"""

from __future__ import annotations

from torch import Tensor

from ...core.select import best_first
from ...errors import SpecError
from .raters import rated

FLOOR = 0.01  # of w(0); heads of 128 with base 1e4 reach it 1479 positions away


def corrected(attention: Tensor, query_positions: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Attention (B, H, R, N) over the bias, which has a floor: it would turn negative far away."""
    w = rope_weight(query_positions, positions, frequencies)
    w = w.clamp_min(FLOOR * (2 * frequencies.shape[0]) ** 0.5)  # w(0) is the root of d
    return attention / w[:, None]


def rope_weight(query_positions: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """(B, R, N) bias w of queries at (B, R) and keys at (B, N); frequencies (d / 2,)."""
    # the sum of cos((p - q) f) as a product of angles; float64 keeps the digits of thousands of radians
    query, key = (p.double()[..., None] * frequencies.double() for p in (query_positions, positions))
    total = query.cos() @ key.cos().transpose(1, 2) + query.sin() @ key.sin().transpose(1, 2)
    return (2 / (2 * frequencies.shape[0]) ** 0.5 * total).float()


def top_heads(scores: Tensor, heads: int | None) -> Tensor:
    """(B, h) heads of scores (B, H, N) with the largest sum over patches, best first; None: half."""
    count = max(1, scores.shape[1] // 2) if heads is None else heads
    if count > scores.shape[1]:
        raise SpecError(
            f"heads={count} but the language model has {scores.shape[1]}; choose fewer, or None for half"
        )
    return best_first(scores.sum(dim=-1), count)


def top_head_scores(attention: Tensor, mask: Tensor | None, heads: int | None) -> Tensor:
    """(B, N) mean over the top heads and the raters of attention (B, H, R, N)."""
    per_head = rated(attention, mask)
    chosen = top_heads(per_head, heads)
    return per_head.gather(1, chosen[..., None].expand(-1, -1, per_head.shape[-1])).mean(dim=1)
