# SPDX-License-Identifier: Apache-2.0
"""The entry point to the kernels: input is checked here, once. ``reference`` says what each one computes.

Every function takes ``backend``: "reference", "torch", "triton", or None for the choice of ``use`` or the
automatic one. Indices come as int32; gradients flow through rows, never through scores or indices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InvariantError
from . import checks, unchecked
from .backends import BACKENDS, use
from .unchecked import run

FIRST = ("nn", "argmax")
COMBINE = ("product", "sum")


def topk_select(scores: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """(B, min(k, N)) ascending indices of the k highest scores (B, N)."""
    _check_scores(scores, k)
    return unchecked.topk_select(scores, k, backend=backend)


def prune(
    scores: Tensor, k: int, xs: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """idx (B, min(k, N)) from ``topk_select``, and these rows of each of xs (B, N, *)."""
    _check_scores(scores, k)
    checks.rows("xs", xs, tuple(scores.shape), scores)
    return unchecked.prune(scores, k, xs, backend=backend)


def gather_rows(
    xs: Sequence[Tensor], idx: Tensor, *, ordered: bool = False, backend: str | None = None
) -> list[Tensor]:
    """(B, K, *) rows of each of xs (B, N, *) at idx (B, K); ``ordered`` promises ascending, distinct ones."""
    checks.listed("xs", xs)
    if not xs:
        return []
    checks.integers("idx", idx, 2, "(B, K)", xs[0] if isinstance(xs[0], Tensor) else idx)
    # a first entry that is no tensor is named by checks.rows, so this must not fail before
    n = xs[0].shape[1] if isinstance(xs[0], Tensor) and xs[0].ndim > 1 else 0
    checks.rows("xs", xs, (idx.shape[0], n), idx)
    checks.inside(idx, n)
    return unchecked.gather_rows(xs, idx, ordered=ordered, backend=backend)


def unprune(g: Tensor, idx: Tensor, n: int, *, ordered: bool = False, backend: str | None = None) -> Tensor:
    """(B, n, *) with the rows of g (B, K, *) at idx (B, K), zeros elsewhere; rows of one place add up.

    ``ordered`` promises ascending, distinct indices, which is faster.
    """
    checks.count("n", n)
    checks.tensor("g", g, tuple(range(2, 26)), "(B, K, *)")
    checks.integers("idx", idx, 2, "(B, K)", g)
    checks.shape("g", g, tuple(idx.shape))
    checks.inside(idx, n)
    full: Tensor = run("unprune", (g, idx, n), (g, idx), backend, (g,), ordered)
    return full


def greedy_maxmin(
    sim: Tensor, k: int, weight: Tensor | None = None, first: str = "nn", *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """k times the token of the largest weight * (1 - its largest similarity to the tokens picked before).

    Args:
        sim: (B, N, N) similarities.
        k: number of picks; all N where there are fewer.
        weight: (B, N), default all ones.
        first: "nn": the first pick is compared with all other tokens; "argmax": it has the largest weight.

    Returns:
        order (B, k) int32 in the order of picking, without repetition, and what each pick was worth (B, k).
    """
    sim = _square(sim, k)
    weight = None if weight is None else _weight("weight", weight, sim)
    checks.choice("first", first, FIRST)
    order, worth = run("greedy_maxmin", (sim, min(k, sim.shape[1]), weight, first), (sim, weight), backend)
    return order, worth


def greedy_maxmin_features(
    features: Tensor, k: int, weight: Tensor | None = None, first: str = "nn", *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """``greedy_maxmin`` by the cosine of features (B, N, D) of unit length, in memory of order N for many."""
    features = _features(features, k)
    weight = None if weight is None else _weight("weight", weight, features)
    checks.choice("first", first, FIRST)
    args = features, min(k, features.shape[1]), weight, first
    order, worth = run("greedy_maxmin_features", args, (features, weight), backend)
    return order, worth


def greedy_dpp(
    sim: Tensor, relevance: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy MAP of the determinantal point process r_i * sim_ij * r_j.

    Args:
        sim: (B, N, N) similarities.
        relevance: (B, N), r.
        k: number of picks; all N where there are fewer.

    Returns:
        order (B, k) int32 in the order of picking, and the factor by which each pick enlarged the determinant
        (B, k): 0 where the tokens picked before span all others, which then come by index.
    """
    sim = _square(sim, k)
    relevance = _weight("relevance", relevance, sim)
    order, gain = run("greedy_dpp", (sim, relevance, min(k, sim.shape[1])), (sim, relevance), backend)
    return order, gain


def greedy_dpp_features(
    features: Tensor, relevance: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """``greedy_dpp`` by inner products of features (B, N, D), in memory of order N + k D for many tokens."""
    features = _features(features, k)
    relevance = _weight("relevance", relevance, features)
    args = features, relevance, min(k, features.shape[1])
    order, gain = run("greedy_dpp_features", args, (features, relevance), backend)
    return order, gain


def greedy_cover(
    rows: Tensor,
    k: int,
    weight: Tensor | None = None,
    combine: str = "product",
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """k times the token that raises most how well all rows are covered, each by the best token picked so far.

    Args:
        rows: (B, R, N), how well each token covers each row; below 0 counts as not at all.
        k: number of picks; all N where there are fewer.
        weight: (B, N), default none. What a token gains is multiplied by it, or it is added.
        combine: "product", for weights from 0 on, or "sum": tokens of weight -inf are picked last.

    Returns:
        order (B, k) int32 in the order of picking, without repetition, and what each pick was worth (B, k).
    """
    checks.tensor("rows", rows, (3,), "(B, R, N)")
    checks.floating("rows", rows)
    checks.count("k", k)
    checks.choice("combine", combine, COMBINE)
    rows = _single(rows)
    if weight is not None:
        checks.tensor("weight", weight, (2,), "(B, N)", rows)
        checks.shape("weight", weight, (rows.shape[0], rows.shape[2]))
        weight = weight.to(rows.dtype)
        if combine == "product":
            checks.not_negative("weight", weight)
    args = rows, min(k, rows.shape[2]), weight, combine
    order, worth = run("greedy_cover", args, (rows, weight), backend)
    return order, worth


def zoo_sensitivity(slope: Tensor, kernel: Tensor, *, backend: str | None = None) -> Tensor:
    """(B, N) quadratic forms g^T K g of slopes g (B, N, H) and a matrix K (H, H)."""
    checks.tensor("slope", slope, (3,), "(B, N, H)")
    checks.floating("slope", slope)
    checks.tensor("kernel", kernel, (2,), "(H, H)", slope)
    checks.shape("kernel", kernel, (slope.shape[2],) * 2)
    if kernel.dtype != slope.dtype:
        raise InvariantError(f"slope is {slope.dtype} and kernel is {kernel.dtype}; expected the same")
    slope, kernel = _single(slope), _single(kernel)
    forms: Tensor = run("zoo_sensitivity", (slope, kernel), (slope, kernel), backend)
    return forms


# --- input ----------------------------------------------------------------------------------------


def _check_scores(scores: Tensor, k: int) -> None:
    checks.tensor("scores", scores, (2,), "(B, N)")
    checks.count("k", k)


def _single(x: Tensor) -> Tensor:
    """In at least float32."""
    # half precision would lose the small differences that a greedy choice turns on; float64 stays
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _square(sim: Tensor, k: int) -> Tensor:
    checks.tensor("sim", sim, (3,), "(B, N, N)")
    checks.floating("sim", sim)
    checks.shape("sim", sim, (sim.shape[0], sim.shape[1], sim.shape[1]))
    checks.count("k", k)
    return _single(sim)


def _features(features: Tensor, k: int) -> Tensor:
    checks.tensor("features", features, (3,), "(B, N, D)")
    checks.floating("features", features)
    checks.count("k", k)
    return _single(features)


def _weight(name: str, value: Tensor, like: Tensor) -> Tensor:
    checks.tensor(name, value, (2,), "(B, N)", like)
    checks.shape(name, value, tuple(like.shape[:2]))
    return value.to(like.dtype)
