# SPDX-License-Identifier: Apache-2.0
"""Greedy choice with one program per sample: all its tokens in registers, all picks in one launch.

A pick is the largest value among the tokens not taken, the lower index of equals, NaN last: the largest key,
where taken ones have key 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_select import sortable


@triton.jit
def value_of(key):
    """The float32 of a key."""
    value = (key - 0x807FFFFF).to(tl.int32, bitcast=True)
    sign = value >> 31
    bits = (value + sign) ^ (sign & 0x7FFFFFFF)
    return tl.where(key == 0x00FFFFFE, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def best_of(value, taken, token):
    """Key and token of the best of what is not taken."""
    key = tl.where(taken, 0, sortable(value))
    top = tl.max(key, 0)
    return top, tl.min(tl.where(key == top, token, 0x7FFFFFFF), 0)


@triton.jit
def worth_of(best, weight, at, valid, WEIGHTED: tl.constexpr):
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
        best = tl.maximum(best, row, propagate_nan=tl.PropagateNan.ALL)
        value = worth_of(best, weight, at, valid, WEIGHTED)


@triton.jit
def settled(residual, floor):
    """Residuals that are rounding noise count as 0."""
    return tl.where(residual <= floor, 0.0, residual)


@triton.jit
def new_row(line, explained, left):
    """The next row of the decomposition; zeros where nothing is left to explain."""
    root = tl.sqrt_rn(tl.where(left > 0, left, 1.0))
    return tl.where(left > 0, tl.div_rn(line - explained, root + tl.zeros_like(line)), 0.0)


@triton.jit(do_not_specialize=["n", "k"])
def dpp_kernel(
    sim,
    relevance,
    history,
    order,
    gain,
    n,
    k,
    batch_stride,
    row_stride,
    noise,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """history (B, k, BLOCK): rows of the decomposition so far, written and read by this program alone."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    valid = lane < n
    taken = lane >= n
    sim += b * batch_stride
    relevance += b * n
    history += b * k * BLOCK
    own = tl.load(relevance + lane, mask=valid, other=0.0)
    residual = own * tl.load(sim + lane.to(tl.int64) * (row_stride + 1), mask=valid, other=0.0) * own
    floor = noise * tl.maximum(residual, 0.0)
    residual = settled(residual, floor)
    for step in range(0, k):
        top, pick = best_of(residual, taken, lane)
        left = value_of(top)
        tl.store(order + b * k + step, pick)
        tl.store(gain + b * k + step, left)
        taken = taken | (lane == pick)
        explained = tl.zeros([BLOCK], tl.float32)
        for start in range(0, step, ROWS):
            before = start + tl.arange(0, ROWS)
            there = before < step
            at = before.to(tl.int64) * BLOCK
            picks = tl.load(history + at + pick, mask=there, other=0.0)
            rows = tl.load(history + at[:, None] + lane[None, :], mask=there[:, None], other=0.0)
            explained += tl.sum(rows * picks[:, None], 0)
        row = tl.load(sim + pick.to(tl.int64) * row_stride + lane, mask=valid, other=0.0)
        row = new_row(tl.load(relevance + pick) * row * own, explained, left)
        tl.store(history + step * BLOCK + lane, row)
        residual = settled(residual - row * row, floor)
        tl.debug_barrier()  # other threads of this program read the row
