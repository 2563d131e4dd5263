# SPDX-License-Identifier: Apache-2.0
"""What kernels share on the device: sortable keys, ranks, the best of what is left, a launch per pick.

Score bits become unsigned keys that sort as the scores do: NaN lowest, both zeros equal. 0 stands for "not a
token", or for one that is taken.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- selection ------------------------------------------------------------------------------------


@triton.jit
def sortable(x):
    """uint32 keys > 0 in the order of float32 ``x``."""
    # denormals are not flushed; no select, on which AMD's compiler trips
    bits = x.to(tl.int32, bitcast=True)
    sign = bits >> 31
    value = (bits ^ (sign & 0x7FFFFFFF)) - sign  # sign and magnitude to two's complement: both zeros are 0
    # to unsigned order; positive NaN wrap around to the bottom
    key = value.to(tl.uint32, bitcast=True) + 0x807FFFFF
    return tl.maximum(key, 0x00FFFFFE)  # every NaN is one key, just below that of -inf


@triton.jit
def value_of(key):
    """The float32 of a key."""
    # the steps of ``sortable`` backwards; its one key for NaN becomes a NaN again
    value = (key - 0x807FFFFF).to(tl.int32, bitcast=True)
    sign = value >> 31
    bits = (value + sign) ^ (sign & 0x7FFFFFFF)
    return tl.where(key == 0x00FFFFFE, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def load_keys(scores, at, valid):
    """Keys of scores at ``at`` (int64); 0 if not valid."""
    return tl.where(valid, sortable(tl.load(scores + at, mask=valid, other=0.0).to(tl.float32)), 0)


@triton.jit
def kth_key(key, k):
    """A bound such that all keys above it and the first of those equal to it make k."""
    # bisection over values: at most 32 counts, and no sort. A bound that exactly k keys reach is as good as
    # the k-th key itself
    low = tl.min(tl.where(key == 0, 0xFFFFFFFF, key), 0)
    high = tl.max(key, 0)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        count = tl.sum((key >= middle).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count == k, middle, tl.where(count > k, high, middle - 1))
    return low


@triton.jit
def keep_rank(key, bound, need, above_before, equal_before):
    """Which keys are kept, if ``need`` of those equal to the bound are, and their places in the output."""
    above = key > bound
    equal = key == bound
    # both ranks from one scan: counts stay below 2**15
    packed = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    rank_above = above_before + (packed & 0xFFFF)
    rank_equal = equal_before + (packed >> 16)
    keep = above | (equal & (rank_equal <= need))
    return keep, rank_above + tl.minimum(rank_equal, need) - 1


# --- rows -----------------------------------------------------------------------------------------


@triton.jit
def copy_rows(x, y, source, target, keep, width, part, split, BD: tl.constexpr):
    """Share ``part`` of ``split`` of the columns of kept rows, from x to y; BD 0: there is no tensor."""
    if BD > 0:
        for column in range(part * BD, width, split * BD):
            at = column + tl.arange(0, BD)
            mask = keep[:, None] & (at < width)[None, :]
            row = tl.load(x + source[:, None] + at[None, :], mask=mask)
            tl.store(y + target[:, None] + at[None, :], row, mask=mask)


# --- greedy choice --------------------------------------------------------------------------------


@triton.jit
def best_of(value, taken, token):
    """Key and token of the best of what is not taken: the largest value, the lower index of equals."""
    key = tl.where(taken, 0, sortable(value))
    top = tl.max(key, 0)
    return top, tl.min(tl.where(key == top, token, 0x7FFFFFFF), 0)


@triton.jit
def place(n, programs, ROWS: tl.constexpr):
    """Batch entry (int64), tokens, and where these stand among all."""
    b = (tl.program_id(0) // programs).to(tl.int64)
    token = tl.program_id(0) % programs * ROWS + tl.arange(0, ROWS)
    return b, token, b * n + token


@triton.jit
def leave(keys, tokens, step, value, taken, token):
    """The best token of a program, for the next launch."""
    key, best = best_of(value, taken, token)
    # two sets take turns: no program reads what this launch writes
    at = (step & 1) * tl.num_programs(0) + tl.program_id(0)
    # the buffer is int32: torch has little for uint32, and the bits are the same
    tl.store(keys + at, key.to(tl.int32, bitcast=True))
    tl.store(tokens + at, best)


@triton.jit
def pick_left(keys, tokens, order, worth, step, k, programs, PARTIALS: tl.constexpr):
    """The pick of the launch before and its value; the first program of a batch entry writes them down."""
    # every program finds the pick for itself: cheaper than a launch that would tell it
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
    """Inner products of rows ``own`` (int64) of x with row ``pick``, over ``used`` of ``width`` columns."""
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for column in range(0, used, WIDTH):
        at = column + tl.arange(0, WIDTH)
        inside = at < width
        mask = valid[:, None] & inside[None, :]
        mine = tl.load(x + own[:, None] * stride + at[None, :], mask=mask, other=0.0).to(tl.float32)
        total += mine * tl.load(x + pick * stride + at, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.sum(total, 1)


@triton.jit
def similarity(
    source, token, pick, valid, d, row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr
):
    """Of all tokens with the pick: looked up in a matrix, or computed from features."""
    if FEATURES:
        return dots(source, token.to(tl.int64), pick, valid, d, d, row_stride, ROWS, WIDTH)
    return tl.load(source + pick * row_stride + token, mask=valid, other=0.0).to(tl.float32)
