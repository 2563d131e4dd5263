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
AVERAGE = ("add", "mean")
RULES = ("paper", "official")


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


def ordered_indices(idx: Tensor, least: int, n: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """idx (B, K) ascending, int64, and (B, K) float32: infinite where one is wrong, else 0.

    Wrong is what is not in ``least`` .. n-1, and what repeats the one before; but -1 may repeat.
    """
    checks.integers("idx", idx, 2, "(B, K)", idx)
    ascending, trouble = run("ordered_indices", (idx, least, n), (idx,), backend)
    return ascending, trouble


def host_slots(idx: Tensor, n: int, *, backend: str | None = None) -> Tensor:
    """(B, K) int64 ascending: the slots in idx (B, K), and for each -1 in it the lowest free one of n."""
    checks.integers("idx", idx, 2, "(B, K)", idx)
    checks.count("n", n)
    checks.inside(idx, n, least=-1)
    if idx.shape[1] > n:
        raise InvariantError(
            f"idx has {idx.shape[1]} entries a row; expected at most the {n} slots there are"
        )
    slots: Tensor = run("host_slots", (idx, n), (idx,), backend)
    return slots


def stretch(scores: Tensor, constant: float, *, backend: str | None = None) -> Tensor:
    """(B, N) scores (B, N) stretched to [0, 1] in every row; all ones where the spread is rounding only.

    That is a spread of at most ``constant`` of the highest score. A row that is not finite becomes NaN.
    """
    checks.tensor("scores", scores, (2,), "(B, N)")
    checks.floating("scores", scores)
    scores = _single(scores)
    found: Tensor = run("stretch", (scores, float(constant)), (scores,), backend)
    return found


def detrend(scores: Tensor, real: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """(B, N) float32 scores (B, N) without the exponential trend over their places, fitted on each row.

    Only scores above zero have a say in the fit, and where given only places of ``real`` (N,) bool. Scores
    below zero become NaN.
    """
    checks.tensor("scores", scores, (2,), "(B, N)")
    checks.floating("scores", scores)
    if real is not None:
        checks.tensor("real", real, (1,), "(N,)", scores)
        checks.shape("real", real, (scores.shape[1],))
        real = real.bool()
    found: Tensor = run("detrend", (scores, real), (scores, real), backend)
    return found


def contextual_groups(
    keys: Tensor, kept: Tensor, first: int, contextual: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Of the patches that are not kept, evenly spaced ones are targets; each other one joins one by its key.

    Args:
        keys: (B, N, C).
        kept: (B, d) ascending patches.
        first: rows that stand before those of the kept patches.
        contextual: how many targets.

    Returns:
        slots (B, first + d + contextual) int64, the patch of every row, -1 for the first ones, and row (B, N)
        int64 of every patch, -1 where there are no targets to join.
    """
    checks.tensor("keys", keys, (3,), "(B, N, C)")
    checks.floating("keys", keys)
    checks.integers("kept", kept, 2, "(B, d)", keys)
    checks.shape("kept", kept, (keys.shape[0],))
    checks.inside(kept, keys.shape[1])
    checks.count("first", first)
    checks.count("contextual", contextual)
    left = keys.shape[1] - kept.shape[1]
    if contextual > left:
        raise InvariantError(
            f"contextual={contextual}; expected at most the {left} patches that are not kept"
        )
    slots, row = run("contextual_groups", (keys, kept, first, contextual), (keys, kept), backend)
    return slots, row


def contextual_rows(
    features: Tensor, slots: Tensor, row: Tensor, start: int, combine: str, *, backend: str | None = None
) -> Tensor:
    """(B, c, D) rows that targets make with their members, summed in at least float32; gradients flow.

    Args:
        features: (B, N, D).
        slots, row: of ``contextual_groups``; targets stand from row ``start`` on.
        combine: "add", a target plus the mean of its members, or "mean" of both.
    """
    checks.tensor("features", features, (3,), "(B, N, D)")
    checks.floating("features", features)
    checks.integers("slots", slots, 2, "(B, K)", features)
    checks.integers("row", row, 2, "(B, N)", features)
    checks.shape("row", row, tuple(features.shape[:2]))
    checks.shape("slots", slots, (features.shape[0],))
    checks.count("start", start)
    checks.inside(slots[:, start:], features.shape[1])
    checks.choice("combine", combine, AVERAGE)
    args = features, slots, row, start, combine
    found: Tensor = run("contextual_rows", args, (features, slots, row), backend, (features,))
    return found


def crop_variance(features: Tensor, members: Tensor, *, backend: str | None = None) -> Tensor:
    """(B, C, M) how much the cosines of each token with the others of its crop vary, from features (B, N, D).

    members (C, M) has the tokens of every crop, and -1 behind the last one.
    """
    checks.tensor("features", features, (3,), "(B, N, D)")
    checks.floating("features", features)
    _check_members(members, features)
    found: Tensor = run("crop_variance", (features, members), (features, members), backend)
    return found


def crop_scores(
    attention: Tensor, variance: Tensor | None, members: Tensor, alpha: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention (B, N) by crop, plus the variance (B, C, M) scaled to it and weighed by ``alpha``.

    Returns:
        scores (B, C, M), zero behind the last token of a crop, NaN where attention is negative, and the mean
        attention of every crop (B, C).
    """
    checks.tensor("attention", attention, (2,), "(B, N)")
    checks.floating("attention", attention)
    _check_members(members, attention)
    attention = _single(attention)
    if variance is not None:
        checks.tensor("variance", variance, (3,), "(B, C, M)", attention)
        checks.shape("variance", variance, (attention.shape[0], *members.shape))
        variance = variance.to(attention.dtype)
    args = attention, variance, members, float(alpha)
    rank, mean = run("crop_scores", args, (attention, variance, members), backend)
    return rank, mean


def share_out(
    mass: Tensor, members: Tensor, k: int, tau: float, rule: str, *, backend: str | None = None
) -> Tensor:
    """(B, C) int64 tokens that each crop keeps by its mass (B, C), k in all; see ``crops``."""
    checks.tensor("mass", mass, (2,), "(B, C)")
    checks.floating("mass", mass)
    checks.integers("members", members, 2, "(C, M)", mass)
    checks.shape("members", members, (mass.shape[1],))
    checks.count("k", k)
    checks.choice("rule", rule, RULES)
    mass = _single(mass)
    quota: Tensor = run("share_out", (mass, members, k, float(tau), rule), (mass, members), backend)
    return quota


def top_k_in_groups(
    scores: Tensor, members: Tensor, quota: Tensor, k: int, *, backend: str | None = None
) -> Tensor:
    """(B, k) int64 tokens: of every group the ``quota`` (B, G) highest scores (B, G, M); see ``crops``."""
    checks.tensor("scores", scores, (3,), "(B, G, M)")
    checks.floating("scores", scores)
    checks.integers("members", members, 2, "(G, M)", scores)
    checks.shape("members", members, tuple(scores.shape[1:]))
    checks.integers("quota", quota, 2, "(B, G)", scores)
    checks.shape("quota", quota, tuple(scores.shape[:2]))
    checks.count("k", k)
    args = _single(scores), members, quota, min(k, members.numel())
    tokens: Tensor = run("top_k_in_groups", args, (scores, members, quota), backend)
    return tokens


# --- input ----------------------------------------------------------------------------------------


def _check_members(members: Tensor, like: Tensor) -> None:
    checks.integers("members", members, 2, "(C, M)", like)
    # -1 stands for no token
    checks.inside(members, like.shape[1], least=-1)


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
