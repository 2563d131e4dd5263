# SPDX-License-Identifier: Apache-2.0
"""The single entry point of the kernels: input is checked here, and the implementation chosen. ``reference``
says what each one computes.

Every function takes ``backend``: "reference", "torch", "triton", or None for the choice of ``use`` or the
automatic one. Indices come as int32; gradients flow through rows, never through scores or indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvariantError
from . import checks
from .backends import BACKENDS, forced, implementation, use

_RANKS = "(B, N), or partial scores (R, B, N)"
FIRST = ("nn", "argmax")
COMBINE = ("product", "sum")
_PLAIN = (Tensor, nn.Parameter)  # not what a fake mode or a subclass puts in their place


def topk_select(scores: Tensor, k: int, *, backend: str | None = None) -> Tensor:
    """(B, min(k, N)) ascending indices of the k highest scores (B, N); or of partial scores (R, B, N), added
    up.
    """
    scores, k = _scored(scores, k)
    return _run("topk_select", (scores, k), (scores,), backend)


def topk_select_varlen(
    scores: Tensor,
    cu_n: Tensor,
    k: Tensor,
    cu_k: Tensor,
    total_k: int,
    max_n: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """(total_k,) indices within their segments: of segment s, cu_n[s] : cu_n[s+1] of scores (T,), the k[s]
    highest.

    Args:
        cu_n, k, cu_k: (S+1,), (S,) and (S+1,); cu_k adds up min(k, size of the segment).
        total_k, max_n: the last entry of cu_k and the size of the largest segment, known without asking the
            device.
    """
    args = _packed(scores, cu_n, k, cu_k, total_k, max_n)
    return _run("topk_select_varlen", args, args[:4], backend)


def prune(
    scores: Tensor, k: int, xs: Sequence[Tensor], pre: int = 0, post: int = 0, *, backend: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Select by scores as ``topk_select`` does, and keep these rows of xs (B, pre+N+post, *), with those
    before and behind.

    Returns:
        idx (B, k), which counts from the first row behind ``pre``, and one (B, pre+k+post, *) for each of xs.
    """
    scores, k = _scored(scores, k)
    checks.count("pre", pre)
    checks.count("post", post)
    checks.rows("xs", xs, (scores.shape[-2], pre + scores.shape[-1] + post), scores)
    idx, ys = _run("prune", (scores, k, list(xs), pre, post), (scores, *xs), backend, xs)
    return idx, list(ys)


def prune_varlen(
    scores: Tensor,
    cu_n: Tensor,
    k: Tensor,
    cu_k: Tensor,
    total_k: int,
    max_n: int,
    xs: Sequence[Tensor],
    *,
    backend: str | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Select by packed scores as ``topk_select_varlen`` does, and keep these rows of packed xs (T, *), as
    (total_k, *).
    """
    args = _packed(scores, cu_n, k, cu_k, total_k, max_n)
    checks.rows("xs", xs, (scores.shape[0],), scores)
    idx, ys = _run("prune_varlen", (*args, list(xs)), (*args[:4], *xs), backend, xs)
    return idx, list(ys)


def gather_rows(
    xs: Sequence[Tensor], idx: Tensor, *, ordered: bool = False, backend: str | None = None
) -> list[Tensor]:
    """(B, K, *) rows of each of xs (B, N, *) at idx (B, K), in any order; ``ordered`` promises ascending,
    distinct ones.
    """
    if not isinstance(xs, list | tuple) or not xs:
        return [] if isinstance(xs, list | tuple) else checks.rows("xs", xs, (), idx)
    checks.integers("idx", idx, 2, "(B, K)", xs[0] if isinstance(xs[0], Tensor) else idx)
    n = xs[0].shape[1] if isinstance(xs[0], Tensor) and xs[0].ndim > 1 else 0
    checks.rows("xs", xs, (idx.shape[0], n), idx)
    return list(_run("gather_rows", (list(xs), idx.int()), (idx, *xs), backend, xs, ordered))


def unprune(g: Tensor, idx: Tensor, n: int, *, ordered: bool = False, backend: str | None = None) -> Tensor:
    """(B, n, *) with the rows of g (B, K, *) at idx (B, K), zeros elsewhere; rows of one place add up.

    ``ordered`` promises ascending, distinct indices, which is faster.
    """
    checks.count("n", n)
    checks.tensor("g", g, tuple(range(2, 26)), "(B, K, *)")
    checks.integers("idx", idx, 2, "(B, K)", g)
    checks.shape("g", g, tuple(idx.shape))
    return _run("unprune", (g, idx.int(), n), (g, idx), backend, (g,), ordered)


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
    weight = _weights("weight", weight, sim)
    checks.choice("first", first, FIRST)
    return _run("greedy_maxmin", (sim, min(k, sim.shape[1]), weight, first), (sim, weight), backend)


def greedy_maxmin_features(
    features: Tensor, k: int, weight: Tensor | None = None, first: str = "nn", *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """``greedy_maxmin`` by the cosine of features (B, N, D) of unit length. Many tokens need memory of order
    N only.
    """
    features = _features(features, k)
    weight = _weights("weight", weight, features)
    checks.choice("first", first, FIRST)
    return _run(
        "greedy_maxmin_features",
        (features, min(k, features.shape[1]), weight, first),
        (features, weight),
        backend,
    )


def greedy_dpp(
    sim: Tensor, relevance: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy MAP of the determinantal point process r_i * sim_ij * r_j, for sim (B, N, N) and relevance r (B,
    N).

    Returns:
        order (B, k) int32 in the order of picking, and by which factor each pick enlarged the determinant (B,
        k): 0 where the tokens picked before span all others, which then come by index.
    """
    sim = _square(sim, k)
    relevance = _weights("relevance", relevance, sim, needed=True)
    return _run("greedy_dpp", (sim, relevance, min(k, sim.shape[1])), (sim, relevance), backend)


def greedy_dpp_features(
    features: Tensor, relevance: Tensor, k: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """``greedy_dpp`` by inner products of features (B, N, D). Many tokens need memory of order N + k D
    only."""
    features = _features(features, k)
    relevance = _weights("relevance", relevance, features, needed=True)
    return _run(
        "greedy_dpp_features",
        (features, relevance, min(k, features.shape[1])),
        (features, relevance),
        backend,
    )


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
    return _run("greedy_cover", (rows, min(k, rows.shape[2]), weight, combine), (rows, weight), backend)


def attn_row_scores(
    q: Tensor, k: Tensor, lse: Tensor | None, v0: int, nv: int, scale: float, *, backend: str | None = None
) -> Tensor:
    """(R, B, nv) float32 parts whose sum is the attention of a query to nv keys from v0 on, softmaxed over
    all, mean over heads.

    Args:
        q: (B, H, d).
        k: (B, Hk, S, d), H / Hk query heads share a key head.
        lse: (B, H) log-sum-exp of the row, as flash attention gives it, or None.
        scale: of the logits.
    """
    checks.tensor("q", q, (3,), "(B, H, d)")
    checks.tensor("k", k, (4,), "(B, Hk, S, d)", q)
    checks.floating("q", q)
    checks.floating("k", k)
    (batch, heads, width), shared = q.shape, k.shape[1]
    if k.shape[0] != batch or k.shape[3] != width or shared == 0 or heads % shared:
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        raise InvariantError(
            f"q and k have shapes {shapes}; expected (B, H, d) and (B, Hk, S, d) with H a multiple of Hk"
        )
    if lse is not None:
        checks.tensor("lse", lse, (2,), "(B, H)", q)
        checks.shape("lse", lse, (batch, heads))
    checks.count("v0", v0)
    checks.count("nv", nv)
    if v0 + nv > k.shape[2]:
        raise InvariantError(f"v0={v0} and nv={nv} reach beyond the {k.shape[2]} keys")
    return _run("attn_row_scores", (q, k, lse, v0, nv, float(scale)), (q, k, lse), backend)


def zoo_sensitivity(slope: Tensor, kernel: Tensor, *, backend: str | None = None) -> Tensor:
    """(B, N) quadratic forms g^T K g of slopes g (B, N, H) and a matrix K (H, H)."""
    checks.tensor("slope", slope, (3,), "(B, N, H)")
    checks.floating("slope", slope)
    checks.tensor("kernel", kernel, (2,), "(H, H)", slope)
    checks.shape("kernel", kernel, (slope.shape[2],) * 2)
    if kernel.dtype != slope.dtype:
        raise InvariantError(f"slope is {slope.dtype} and kernel is {kernel.dtype}; expected the same")
    slope, kernel = _single(slope), _single(kernel)
    return _run("zoo_sensitivity", (slope, kernel), (slope, kernel), backend)


# --- input ----------------------------------------------------------------------------------------


def _scored(scores: Tensor, k: int) -> tuple[Tensor, int]:
    checks.tensor("scores", scores, (2, 3), _RANKS)
    checks.count("k", k)
    if scores.ndim == 3 and scores.shape[0] == 0:
        raise InvariantError(f"scores is {checks.described(scores)}: no parts to add up; expected {_RANKS}")
    return scores.float(), min(k, scores.shape[-1])


def _packed(scores: Tensor, cu_n: Tensor, k: Tensor, cu_k: Tensor, total_k: int, max_n: int) -> tuple:
    checks.tensor("scores", scores, (1,), "packed scores (T,)")
    for name, value, expected in (("cu_n", cu_n, "(S+1,)"), ("k", k, "(S,)"), ("cu_k", cu_k, "(S+1,)")):
        checks.integers(name, value, 1, expected, scores)
    checks.count("total_k", total_k)
    checks.count("max_n", max_n)
    checks.segments(scores.shape[0], cu_n, k, cu_k, total_k, max_n)
    return scores.float(), cu_n.int(), k.int(), cu_k.int(), total_k, max_n


def _single(x: Tensor) -> Tensor:
    """In at least float32."""
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


def _weights(name: str, value: Tensor | None, like: Tensor, needed: bool = False) -> Tensor | None:
    if value is None and not needed:
        return None
    checks.tensor(name, value, (2,), "(B, N)", like)
    checks.shape(name, value, tuple(like.shape[:2]))
    return value.to(like.dtype)


# --- start ----------------------------------------------------------------------------------------


def _run(
    name: str,
    args: tuple,
    tensors: Sequence[Tensor | None],
    backend: str | None,
    differentiable: Sequence[Tensor] = (),
    ordered: bool = False,
) -> Any:
    """Straight to the implementation, or through ``torch.ops`` while a compiler, autograd or a fake mode
    is active.
    """
    compiling, grad = torch.compiler.is_compiling(), torch.is_grad_enabled()
    recorded = grad and any([x.requires_grad for x in differentiable])
    if not compiling and not recorded and all([x is None or type(x) in _PLAIN for x in tensors]):
        if name in ("gather_rows", "unprune"):
            n = args[2] if name == "unprune" else args[0][0].shape[1]
            checks.inside(args[1], n)
        like = args[0][0] if name == "gather_rows" else args[0]
        run = implementation(name, like, backend, ordered)
        if not (grad and any([x is not None and x.requires_grad for x in tensors])):
            return run(*args)
        with torch.no_grad():  # entering it takes as long as a small kernel
            return run(*args)
    from . import ops

    # what use() says is read when a compiled function runs; a gradient runs elsewhere, so that it is told
    options = {"backend": backend or ""} if compiling else {"backend": forced(backend)}
    if name in ("gather_rows", "unprune"):
        options["ordered"] = ordered
    return getattr(ops.NAMESPACE, name)(*args, **options)
