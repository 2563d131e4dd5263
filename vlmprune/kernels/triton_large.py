# SPDX-License-Identifier: Apache-2.0
"""Top-k of segments too long for one program: three histograms of 11, 11 and 10 bits, then one ordered
compaction.

Each launch reads the counts that the ones before it have written, so no program waits for another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_select import keep_rank, load_keys, segment

CHUNK = 4096  # tokens of a program
BINS = 2048


@triton.jit
def narrow(hist, k, BINS: tl.constexpr):
    """Bin of the k-th largest key, and how many keys of that bin belong to the k."""
    bins = tl.arange(0, BINS)
    count = tl.load(hist + bins)
    reach = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # keys in this bin or above, falling with the bin
    digit = tl.sum((reach >= k).to(tl.int32), 0) - 1
    return digit.to(tl.uint32), k - tl.sum(tl.where(bins > digit, count, 0), 0)


@triton.jit(do_not_specialize=["n", "k", "parts", "stride", "chunks"])
def histogram_kernel(
    scores,
    hist,
    cu_n,
    ks,
    cu_k,
    n,
    k,
    parts,
    stride,
    chunks,
    DIGIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Adds the digits of one chunk to hist (S, 3, BINS), of the keys that share the digits before with the
    k-th largest.
    """
    s = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    start, n, _, k = segment(s, n, k, cu_n, ks, cu_k, VARLEN)
    if chunk * CHUNK < n:
        hist += s * 3 * BINS
        token = chunk * CHUNK + tl.arange(0, CHUNK)
        valid = token < n
        key = load_keys(scores, start + token, valid, parts, stride)
        if DIGIT == 0:
            digit = key >> 21
        else:
            high, k = narrow(hist, k, BINS)
            if DIGIT == 1:
                valid = valid & ((key >> 21) == high)
                digit = (key >> 10) & 0x7FF
            else:
                low, k = narrow(hist + BINS, k, BINS)
                valid = valid & ((key >> 10) == ((high << 11) | low))
                digit = key & 0x3FF
        # counted within the program first: scores crowd in few bins
        count = tl.histogram(digit.to(tl.int32), BINS, mask=valid)
        tl.atomic_add(hist + DIGIT * BINS + tl.arange(0, BINS), count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n", "k", "parts", "stride", "chunks"])
def compact_kernel(
    scores,
    hist,
    idx,
    cu_n,
    ks,
    cu_k,
    n,
    k,
    parts,
    stride,
    chunks,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    VARLEN: tl.constexpr,
):
    s = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    start, n, first, k = segment(s, n, k, cu_n, ks, cu_k, VARLEN)
    if chunk * CHUNK < n:
        hist += s * 3 * BINS
        high, need = narrow(hist, k, BINS)
        middle, need = narrow(hist + BINS, need, BINS)
        low, need = narrow(hist + 2 * BINS, need, BINS)
        bound = (high << 21) | (middle << 10) | low
        lane = tl.arange(0, CHUNK)
        above = tl.zeros([CHUNK], tl.int32)
        equal = tl.zeros([CHUNK], tl.int32)
        for before in range(0, chunk):
            token = before * CHUNK + lane
            key = load_keys(scores, start + token, token < n, parts, stride)
            above += (key > bound).to(tl.int32)
            equal += (key == bound).to(tl.int32)
        token = chunk * CHUNK + lane
        key = load_keys(scores, start + token, token < n, parts, stride)
        keep, place = keep_rank(key, bound, need, tl.sum(above, 0), tl.sum(equal, 0))
        tl.store(idx + first + place, token, mask=keep)
