# SPDX-License-Identifier: Apache-2.0
"""Greedy choice with one launch per pick, for more tokens or longer sums than one program can take.

Each program owns some tokens. It leaves the best of them behind, and in the next launch all programs find the
best of these: what a launch reads was written by the one before (two sets of leavings take turns), so no
program waits for another. Launch 0 prepares, launch ``step`` makes pick ``step - 1``, and launch ``k`` makes
the last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_greedy import best_of, new_row, settled, value_of, worth_of


@triton.jit
def place(n, programs, ROWS: tl.constexpr):
    """Batch entry (int64), tokens, and where these stand among all."""
    b = (tl.program_id(0) // programs).to(tl.int64)
    token = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    return b, token, b * n + token


@triton.jit
def leave(keys, tokens, step, value, taken, token):
    key, best = best_of(value, taken, token)
    at = (step & 1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(keys + at, key.to(tl.int32, bitcast=True))
    tl.store(tokens + at, best)


@triton.jit
def pick_left(keys, tokens, order, worth, step, k, programs, PARTIALS: tl.constexpr):
    """The pick of the launch before, which the first program of each batch entry writes down, and its
    value."""
    b = tl.program_id(0) // programs
    lane = tl.arange(0, PARTIALS)
    there = lane < programs
    at = ((step - 1) & 1) * tl.num_programs(0) + b * programs + lane
    key = tl.load(keys + at, mask=there, other=0).to(tl.uint32, bitcast=True)
    token = tl.load(tokens + at, mask=there, other=0)
    top = tl.max(key, 0)
    pick = tl.min(tl.where(key == top, token, 0x7FFFFFFF), 0)
    if tl.program_id(0) % programs == 0:
        tl.store(order + b.to(tl.int64) * k + step - 1, pick)
        tl.store(worth + b.to(tl.int64) * k + step - 1, value_of(top))
    return pick.to(tl.int64), value_of(top)


@triton.jit
def dots(x, own, pick, valid, used, width, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Inner products of the rows ``own`` (int64) of x with row ``pick``, over the first ``used`` columns of
    ``width``.
    """
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for column in range(0, used, WIDTH):
        at = column + tl.arange(0, WIDTH)
        inside = at < width
        mine = tl.load(
            x + own[:, None] * stride + at[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        )
        total += (
            mine.to(tl.float32)
            * tl.load(x + pick * stride + at, mask=inside, other=0.0).to(tl.float32)[None, :]
        )
    return tl.sum(total, 1)


@triton.jit
def similarity(
    source, token, pick, valid, d, row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr
):
    if FEATURES:
        return dots(source, token.to(tl.int64), pick, valid, d, d, row_stride, ROWS, WIDTH)
    return tl.load(source + pick * row_stride + token, mask=valid, other=0.0).to(tl.float32)


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
            row = similarity(
                source + b * batch_stride, token, pick, valid, d, row_stride, ROWS, WIDTH, FEATURES
            )
            near = tl.maximum(
                tl.load(best + at, mask=valid, other=0.0), row, propagate_nan=tl.PropagateNan.ALL
            )
            gone = (tl.load(taken + at, mask=valid, other=1) != 0) | (token == pick)
            tl.store(best + at, near, mask=valid)
            tl.store(taken + at, gone.to(tl.int8), mask=valid)
            leave(keys, tokens, step, worth_of(near, weight, at, valid, WEIGHTED), gone, token)


@triton.jit(do_not_specialize=["n", "k", "step", "programs"])
def dpp_step_kernel(
    source,
    relevance,
    residual,
    floor,
    taken,
    history,
    keys,
    tokens,
    order,
    gain,
    n,
    k,
    step,
    programs,
    d,
    batch_stride,
    row_stride,
    history_stride,
    noise,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTIALS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """history (B, N, at least k), zeros at first: columns of the decomposition, a row for each token."""
    b, token, at = place(n, programs, ROWS)
    valid = token < n
    source += b * batch_stride
    own = tl.load(relevance + at, mask=valid, other=0.0)
    if step == 0:
        if FEATURES:
            norm = tl.zeros([ROWS, WIDTH], tl.float32)
            for column in range(0, d, WIDTH):
                across = column + tl.arange(0, WIDTH)
                mask = valid[:, None] & (across < d)[None, :]
                row = tl.load(
                    source + token.to(tl.int64)[:, None] * row_stride + across[None, :], mask=mask, other=0.0
                )
                norm += row.to(tl.float32) * row.to(tl.float32)
            itself = tl.sum(norm, 1)
        else:
            itself = tl.load(source + token.to(tl.int64) * (row_stride + 1), mask=valid, other=0.0).to(
                tl.float32
            )
        start = own * itself * own
        least = noise * tl.maximum(start, 0.0)
        start = settled(start, least)
        tl.store(floor + at, least, mask=valid)
        tl.store(residual + at, start, mask=valid)
        tl.store(taken + at, tl.zeros([ROWS], tl.int8), mask=valid)
        leave(keys, tokens, step, start, token >= n, token)
    else:
        pick, left = pick_left(keys, tokens, order, gain, step, k, programs, PARTIALS)
        if step < k:
            row = similarity(source, token, pick, valid, d, row_stride, ROWS, WIDTH, FEATURES)
            history += b * n * history_stride
            mine = token.to(tl.int64)
            explained = dots(
                history, mine, pick, valid, step - 1, history_stride, history_stride, ROWS, WIDTH
            )
            row = new_row(tl.load(relevance + b * n + pick) * row * own, explained, left)
            tl.store(history + mine * history_stride + step - 1, row, mask=valid)
            rest = tl.load(residual + at, mask=valid, other=0.0) - row * row
            rest = settled(rest, tl.load(floor + at, mask=valid, other=0.0))
            gone = (tl.load(taken + at, mask=valid, other=1) != 0) | (token == pick)
            tl.store(residual + at, rest, mask=valid)
            tl.store(taken + at, gone.to(tl.int8), mask=valid)
            leave(keys, tokens, step, rest, gone, token)
