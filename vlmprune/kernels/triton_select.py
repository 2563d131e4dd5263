# SPDX-License-Identifier: Apache-2.0
"""Top-k by bisection over sortable keys in registers: one program per segment of up to 8192 tokens.

A segment is one row of a batch, or one stretch of a packed batch (VARLEN). Score bits become unsigned keys
that sort as the scores do: NaN lowest, both zeros equal. 0 stands for "not a token".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment(s, n, k, cu_n, ks, cu_k, VARLEN: tl.constexpr):
    """First token (int64), tokens, first output (int64) and outputs, never more than tokens, of segment
    ``s``.
    """
    if VARLEN:
        start = tl.load(cu_n + s)
        n = tl.load(cu_n + s + 1) - start
        first = tl.load(cu_k + s)
        k = tl.minimum(tl.load(ks + s), n)
        return start.to(tl.int64), n, first.to(tl.int64), k
    return s.to(tl.int64) * n, n, s.to(tl.int64) * k, k


@triton.jit
def sortable(x):
    """uint32 keys > 0 in the order of float32 ``x``. No flush of denormals, and no select, on which AMD's
    compiler trips.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = bits >> 31
    value = (bits ^ (sign & 0x7FFFFFFF)) - sign  # sign and magnitude to two's complement: both zeros are 0
    key = (
        value.to(tl.uint32, bitcast=True) + 0x807FFFFF
    )  # to unsigned order; positive NaN wrap around to the bottom
    return tl.maximum(key, 0x00FFFFFE)  # every NaN is one key, just below that of -inf


@triton.jit
def load_keys(scores, at, valid, parts, stride):
    """Keys of the scores at ``at`` (int64), summed over ``parts`` partial scores in their order; 0 where not
    ``valid``.
    """
    total = tl.load(scores + at, mask=valid, other=0.0).to(tl.float32)
    for _ in range(1, parts):
        at += stride
        total += tl.load(scores + at, mask=valid, other=0.0).to(tl.float32)
    return tl.where(valid, sortable(total), 0)


@triton.jit
def kth_key(key, k):
    """A bound such that all keys above it and the first of those equal to it make k."""
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
    """Which keys are kept, and the place of each in the output, when ``need`` of those equal to the bound
    are.
    """
    above = key > bound
    equal = key == bound
    # both ranks from one scan: counts stay below 2**15
    packed = tl.cumsum(above.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    rank_above = above_before + (packed & 0xFFFF)
    rank_equal = equal_before + (packed >> 16)
    keep = above | (equal & (rank_equal <= need))
    return keep, rank_above + tl.minimum(rank_equal, need) - 1


@triton.jit(do_not_specialize=["n", "k", "parts", "stride"])
def select_kernel(
    scores, idx, cu_n, ks, cu_k, n, k, parts, stride, BLOCK: tl.constexpr, VARLEN: tl.constexpr
):
    start, n, first, k = segment(tl.program_id(0), n, k, cu_n, ks, cu_k, VARLEN)
    lane = tl.arange(0, BLOCK)
    key = load_keys(scores, start + lane, lane < n, parts, stride)
    bound = kth_key(key, k)
    need = k - tl.sum((key > bound).to(tl.int32), 0)
    keep, place = keep_rank(key, bound, need, 0, 0)
    tl.store(idx + first + place, lane, mask=keep)
