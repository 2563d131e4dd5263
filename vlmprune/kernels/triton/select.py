# SPDX-License-Identifier: Apache-2.0
"""Top-k: by bisection over keys in registers, or by histograms where one program cannot hold them.

Up to 8192 tokens of a sample are one program. More take three histograms, of 11, 11 and 10 bits, and one
ordered compaction. Each launch reads the counts that the ones before it have written, so no program waits
for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import keep_rank, kth_key, load_keys
from .launch import MAX_BLOCK, block_of, launch, warps

CHUNK = 4096  # tokens of a program
BINS = 2048

# --- device ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["n", "k"])
def select_kernel(scores, idx, n, k, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    key = load_keys(scores, b * n + lane, lane < n)
    bound = kth_key(key, k)
    # of the keys that equal the bound so many are kept, from the left
    need = k - tl.sum((key > bound).to(tl.int32), 0)
    keep, place = keep_rank(key, bound, need, 0, 0)
    tl.store(idx + b * k + place, lane, mask=keep)


@triton.jit
def narrow(hist, k, BINS: tl.constexpr):
    """Bin of the k-th largest key, and how many keys of that bin belong to the k."""
    bins = tl.arange(0, BINS)
    count = tl.load(hist + bins)
    reach = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # keys in this bin or above, falling with the bin
    # the last bin that k keys reach, since ``reach`` falls
    digit = tl.sum((reach >= k).to(tl.int32), 0) - 1
    return digit.to(tl.uint32), k - tl.sum(tl.where(bins > digit, count, 0), 0)


@triton.jit(do_not_specialize=["n", "k", "chunks"])
def histogram_kernel(
    scores,
    hist,
    n,
    k,
    chunks,
    DIGIT: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Adds digits of a chunk to hist (B, 3, BINS): of keys with the higher digits of the k-th largest."""
    b = (tl.program_id(0) // chunks).to(tl.int64)
    token = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    hist += b * 3 * BINS
    valid = token < n
    key = load_keys(scores, b * n + token, valid)
    if DIGIT == 0:
        # 32 bits are 11, 11 and 10
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
    # whole numbers add up to the same in any order
    tl.atomic_add(hist + DIGIT * BINS + tl.arange(0, BINS), count, mask=count > 0, sem="relaxed")


@triton.jit(do_not_specialize=["n", "k", "chunks"])
def compact_kernel(scores, hist, idx, n, k, chunks, CHUNK: tl.constexpr, BINS: tl.constexpr):
    b = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    hist += b * 3 * BINS
    high, need = narrow(hist, k, BINS)
    middle, need = narrow(hist + BINS, need, BINS)
    low, need = narrow(hist + 2 * BINS, need, BINS)
    bound = (high << 21) | (middle << 10) | low
    lane = tl.arange(0, CHUNK)
    # keys above the bound in the low half, equal ones in the high half: two counters spill registers
    counts = tl.zeros([CHUNK], tl.int32)
    # what earlier chunks keep is counted anew, so that no program waits for a scan over all
    for before in range(0, chunk):
        token = before * CHUNK + lane
        key = load_keys(scores, b * n + token, token < n)
        counts += (key > bound).to(tl.int32) + ((key == bound).to(tl.int32) << 16)
    above, equal = tl.sum(counts & 0xFFFF, 0), tl.sum(counts >> 16, 0)
    token = chunk * CHUNK + lane
    key = load_keys(scores, b * n + token, token < n)
    keep, place = keep_rank(key, bound, need, above, equal)
    tl.store(idx + b * k + place, token, mask=keep)


# --- host -----------------------------------------------------------------------------------------


def topk_select(scores: Tensor, k: int) -> Tensor:
    """(B, min(k, N)) indices of the highest of scores (B, N)."""
    batch, n = scores.shape
    k = min(k, n)
    idx = torch.empty(batch, k, dtype=torch.int32, device=scores.device)
    select(scores.contiguous(), idx)
    return idx


def select(scores: Tensor, idx: Tensor) -> None:
    """Fill idx (B, k) with the indices of the highest of scores (B, N), contiguous."""
    if not idx.numel():
        return
    batch, n = scores.shape
    k = idx.shape[1]
    if n <= MAX_BLOCK:
        block = block_of(n)
        launch(select_kernel, batch, scores, idx, n, k, block, num_warps=warps(block))
        return
    chunks = -(-n // CHUNK)
    hist = torch.zeros(batch, 3, BINS, dtype=torch.int32, device=scores.device)
    for digit in range(3):
        shape = n, k, chunks, digit, CHUNK, BINS
        launch(histogram_kernel, batch * chunks, scores, hist, *shape, num_warps=8)
    launch(compact_kernel, batch * chunks, scores, hist, idx, n, k, chunks, CHUNK, BINS, num_warps=8)
