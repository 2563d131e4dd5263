# SPDX-License-Identifier: Apache-2.0
"""Greedy max-min: all picks in one launch, or one launch per pick for more tokens and for features.

In one launch, a program holds all tokens of a sample in registers. A pick is the largest key among the tokens
not taken: the largest value, the lower index of equals, NaN last.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import best_of, leave, pick_left, place, similarity, value_of
from .greedy import Steps, outputs, rows_contiguous
from .launch import MAX_BLOCK, block_of, launch, launch_steps, warps

_SIMILARITIES = 2**25  # held at a time, to find nearest neighbours by features

# --- device ---------------------------------------------------------------------------------------


@triton.jit
def worth_of(best, weight, at, valid, WEIGHTED: tl.constexpr):
    """Of tokens by their largest similarity to what was picked."""
    value = 1 - best
    if WEIGHTED:
        value = tl.load(weight + at, mask=valid, other=0.0) * value
    return value


@triton.jit(do_not_specialize=["n"])
def nearest_kernel(
    sim,
    weight,
    first,
    n,
    batch_stride,
    row_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """What each token is worth by its most similar other one; a NaN among its similarities makes NaN."""
    blocks = tl.cdiv(n, ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    token = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    valid = token < n
    row = sim + b * batch_stride + token.to(tl.int64) * row_stride
    most = tl.full([ROWS, BLOCK], -float("inf"), tl.float32)
    spoilt = tl.zeros([ROWS, BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        other = start + tl.arange(0, BLOCK)
        wanted = valid[:, None] & (other < n)[None, :] & (token[:, None] != other[None, :])
        value = tl.load(row[:, None] + other[None, :], mask=wanted, other=-float("inf"))
        # the comparison below drops NaN without a word, so they are noted apart
        spoilt |= (value != value).to(tl.int32)
        most = tl.where(value > most, value, most)
    best = tl.where(tl.max(spoilt, 1) > 0, float("nan"), tl.max(most, 1))
    best = tl.where(n == 1, 0.0, best)
    at = b * n + token
    tl.store(first + at, worth_of(best, weight, at, valid, WEIGHTED), mask=valid)


@triton.jit(do_not_specialize=["n", "k"])
def maxmin_kernel(
    sim,
    weight,
    first,
    order,
    worth,
    n,
    k,
    batch_stride,
    row_stride,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    valid = lane < n
    taken = lane >= n
    at = b * n + lane
    value = tl.load(first + at, mask=valid, other=0.0)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    sim += b * batch_stride
    for step in range(0, k):
        top, pick = best_of(value, taken, lane)
        tl.store(order + b * k + step, pick)
        tl.store(worth + b * k + step, value_of(top))
        taken = taken | (lane == pick)
        row = tl.load(sim + pick.to(tl.int64) * row_stride + lane, mask=valid, other=0.0)
        # tl.maximum drops NaN unless told
        best = tl.maximum(best, row, propagate_nan=tl.PropagateNan.ALL)
        value = worth_of(best, weight, at, valid, WEIGHTED)


@triton.jit(do_not_specialize=["n", "k", "step", "programs"])
def maxmin_step_kernel(
    source,
    weight,
    first,
    best,
    taken,
    keys,
    tokens,
    order,
    worth,
    n,
    k,
    step,
    programs,
    d,
    batch_stride,
    row_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTIALS: tl.constexpr,
    FEATURES: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """source: similarities (B, N, N), or features (B, N, D). best, taken: (B, N), of this call."""
    b, token, at = place(n, programs, ROWS)
    valid = token < n
    if step == 0:
        tl.store(best + at, tl.full([ROWS], -float("inf"), tl.float32), mask=valid)
        tl.store(taken + at, tl.zeros([ROWS], tl.int8), mask=valid)
        leave(keys, tokens, step, tl.load(first + at, mask=valid, other=0.0), token >= n, token)
    else:
        pick, _ = pick_left(keys, tokens, order, worth, step, k, programs, PARTIALS)
        if step < k:
            source += b * batch_stride
            row = similarity(source, token, pick, valid, d, row_stride, ROWS, WIDTH, FEATURES)
            near = tl.load(best + at, mask=valid, other=0.0)
            near = tl.maximum(near, row, propagate_nan=tl.PropagateNan.ALL)
            gone = (tl.load(taken + at, mask=valid, other=1) != 0) | (token == pick)
            tl.store(best + at, near, mask=valid)
            tl.store(taken + at, gone.to(tl.int8), mask=valid)
            leave(keys, tokens, step, worth_of(near, weight, at, valid, WEIGHTED), gone, token)


# --- host -----------------------------------------------------------------------------------------


def greedy_maxmin(
    sim: Tensor, k: int, weight: Tensor | None = None, first: str = "nn"
) -> tuple[Tensor, Tensor]:
    """Order of picks (B, min(k, N)) by similarities (B, N, N), and what each was worth (B, min(k, N))."""
    batch, n = sim.shape[:2]
    if n > MAX_BLOCK:
        return _by_steps(sim, k, weight, first, features=False)
    sim, weight = rows_contiguous(sim), None if weight is None else weight.contiguous()
    order, worth = outputs(sim, k)
    start = _first_values(sim, weight, first, features=False)
    block = block_of(n)
    shape = n, order.shape[1], sim.stride(0), sim.stride(1), block, weight is not None
    # a pointer that nothing reads where there are no weights
    args = sim, start if weight is None else weight, start, order, worth
    launch(maxmin_kernel, batch, *args, *shape, num_warps=min(16, 2 * warps(block)))
    return order, worth


def greedy_maxmin_features(
    features: Tensor, k: int, weight: Tensor | None = None, first: str = "nn"
) -> tuple[Tensor, Tensor]:
    """``greedy_maxmin`` by features (B, N, D) of unit length, without a matrix: a launch per pick."""
    return _by_steps(features, k, weight, first, features=True)


def _by_steps(
    source: Tensor, k: int, weight: Tensor | None, first: str, features: bool
) -> tuple[Tensor, Tensor]:
    source, weight = rows_contiguous(source), None if weight is None else weight.contiguous()
    order, worth = outputs(source, k)
    start = _first_values(source, weight, first, features)
    steps = Steps(source)
    state = steps.state(), steps.taken, *steps.left
    args = source, start if weight is None else weight, start, *state, order, worth
    shape = *steps.sizes(source, order.shape[1]), *steps.tiles, features, weight is not None
    launch_steps(maxmin_step_kernel, steps.grid, order.shape[1] + 1, "step", *args, *shape, num_warps=4)
    return order, worth


def _first_values(source: Tensor, weight: Tensor | None, first: str, features: bool) -> Tensor:
    """(B, N) what each token is worth as the first pick."""
    batch, n = source.shape[:2]
    if first == "argmax" and weight is not None:
        return weight
    value = torch.empty(batch, n, dtype=torch.float32, device=source.device)
    if first == "argmax":
        return value.fill_(1)
    if features:
        value = 1 - _nearest_by_features(source)
        return value if weight is None else weight * value
    rows = 4
    shape = n, source.stride(0), source.stride(1), rows, min(1024, block_of(n)), weight is not None
    args = source, value if weight is None else weight, value
    launch(nearest_kernel, batch * -(-n // rows), *args, *shape, num_warps=4)
    return value


def _nearest_by_features(features: Tensor) -> Tensor:
    """(B, N) cosine of each token to its most similar other one; 0 for a token that is alone."""
    n = features.shape[1]
    if n == 1:
        return torch.zeros(features.shape[:2], dtype=torch.float32, device=features.device)
    found = []
    chunk = max(1, _SIMILARITIES // (features.shape[0] * n))
    for start in range(0, n, chunk):
        cosine = (features[:, start : start + chunk] @ features.transpose(1, 2)).float()  # (B, chunk, N)
        cosine.diagonal(start, dim1=1, dim2=2).fill_(-torch.inf)
        found.append(cosine.amax(-1))
    return torch.cat(found, dim=1)
