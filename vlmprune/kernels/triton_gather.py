# SPDX-License-Identifier: Apache-2.0
"""Rows copied by selection: select and copy in one launch, copy by known indices, and the way back.

Up to four tensors share one launch, (B, rows, D) or side tensors (B, rows) with D = 1. Widths and strides
must stay specialised: without their divisibility known, copies fall back to two-byte accesses. Offsets are 64
bits wide.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_select import keep_rank, kth_key, load_keys, segment


@triton.jit
def copy_rows(x, y, source, target, keep, width, part, split, BD: tl.constexpr):
    """Columns of share ``part`` of ``split`` of the rows at offset ``source`` of x to offset ``target`` of y,
    where ``keep``.
    """
    for column in range(part * BD, width, split * BD):
        at = column + tl.arange(0, BD)
        mask = keep[:, None] & (at < width)[None, :]
        tl.store(
            y + target[:, None] + at[None, :],
            tl.load(x + source[:, None] + at[None, :], mask=mask),
            mask=mask,
        )


@triton.jit
def copy_all(
    x0,
    y0,
    d0,
    b0,
    r0,
    x1,
    y1,
    d1,
    b1,
    r1,
    x2,
    y2,
    d2,
    b2,
    r2,
    x3,
    y3,
    d3,
    b3,
    r3,
    batch,
    row,
    target,
    keep,
    part,
    split,
    BD0: tl.constexpr,
    BD1: tl.constexpr,
    BD2: tl.constexpr,
    BD3: tl.constexpr,
    TENSORS: tl.constexpr,
):
    """``row`` and ``target``: int64. Tensor i: width d, strides b of a batch entry (0 when packed) and r of a
    row.
    """
    copy_rows(x0, y0, batch * b0 + row * r0, target * d0, keep, d0, part, split, BD0)
    if TENSORS > 1:
        copy_rows(x1, y1, batch * b1 + row * r1, target * d1, keep, d1, part, split, BD1)
    if TENSORS > 2:
        copy_rows(x2, y2, batch * b2 + row * r2, target * d2, keep, d2, part, split, BD2)
    if TENSORS > 3:
        copy_rows(x3, y3, batch * b3 + row * r3, target * d3, keep, d3, part, split, BD3)


@triton.jit(do_not_specialize=["n", "k", "pre", "post", "parts", "stride", "blocks", "split"])
def prune_kernel(
    scores,
    idx,
    cu_n,
    ks,
    cu_k,
    x0,
    y0,
    d0,
    b0,
    r0,
    x1,
    y1,
    d1,
    b1,
    r1,
    x2,
    y2,
    d2,
    b2,
    r2,
    x3,
    y3,
    d3,
    b3,
    r3,
    n,
    k,
    pre,
    post,
    parts,
    stride,
    blocks,
    split,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BD0: tl.constexpr,
    BD1: tl.constexpr,
    BD2: tl.constexpr,
    BD3: tl.constexpr,
    TENSORS: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Every program selects anew, which is cheap, and copies its own slice of source rows: no scratch, no
    second launch.
    """
    pid = tl.program_id(0)
    s = pid // (blocks * split)
    block = pid // split % blocks
    start, n, first, k = segment(s, n, k, cu_n, ks, cu_k, VARLEN)
    if block * ROWS < pre + n + post:
        lane = tl.arange(0, BLOCK)
        key = load_keys(scores, start + lane, lane < n, parts, stride)
        bound = kth_key(key, k)
        above = (key > bound).to(tl.int32)
        equal = (key == bound).to(tl.int32)
        need = k - tl.sum(above, 0)
        before = (lane < block * ROWS - pre).to(tl.int32)
        above_before = tl.sum(above * before, 0)
        equal_before = tl.sum(equal * before, 0)

        row = block * ROWS + tl.arange(0, ROWS)
        token = row - pre
        own = load_keys(scores, start + token, (token >= 0) & (token < n), parts, stride)
        keep, place = keep_rank(own, bound, need, above_before, equal_before)
        if pid % split == 0:
            tl.store(idx + first + place, token, mask=keep)
        target = tl.where(token < 0, row, tl.where(token < n, pre + place, pre + k + token - n))
        keep = keep | (token < 0) | ((token >= n) & (token < n + post))
        batch = s.to(tl.int64)
        source = row.to(tl.int64) if not VARLEN else start + row
        out = batch * (pre + k + post) if not VARLEN else first
        copy_all(
            x0,
            y0,
            d0,
            b0,
            r0,
            x1,
            y1,
            d1,
            b1,
            r1,
            x2,
            y2,
            d2,
            b2,
            r2,
            x3,
            y3,
            d3,
            b3,
            r3,
            batch,
            source,
            out + target,
            keep,
            pid % split,
            split,
            BD0,
            BD1,
            BD2,
            BD3,
            TENSORS,
        )


@triton.jit(do_not_specialize=["n", "k", "pre", "post", "blocks", "split"])
def gather_kernel(
    idx,
    cu_n,
    ks,
    cu_k,
    x0,
    y0,
    d0,
    b0,
    r0,
    x1,
    y1,
    d1,
    b1,
    r1,
    x2,
    y2,
    d2,
    b2,
    r2,
    x3,
    y3,
    d3,
    b3,
    r3,
    n,
    k,
    pre,
    post,
    blocks,
    split,
    ROWS: tl.constexpr,
    BD0: tl.constexpr,
    BD1: tl.constexpr,
    BD2: tl.constexpr,
    BD3: tl.constexpr,
    TENSORS: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """The slice of output rows of every program; rows before and behind the tokens are kept."""
    pid = tl.program_id(0)
    s = pid // (blocks * split)
    start, n, first, k = segment(s, n, k, cu_n, ks, cu_k, VARLEN)
    target = pid // split % blocks * ROWS + tl.arange(0, ROWS)
    chosen = target - pre
    token = tl.load(idx + first + chosen, mask=(chosen >= 0) & (chosen < k), other=0)
    row = tl.where(chosen < 0, target, tl.where(chosen < k, pre + token, pre + n + chosen - k))
    keep = target < pre + k + post
    batch = s.to(tl.int64)
    source = row.to(tl.int64) if not VARLEN else start + row
    out = batch * (pre + k + post) if not VARLEN else first
    copy_all(
        x0,
        y0,
        d0,
        b0,
        r0,
        x1,
        y1,
        d1,
        b1,
        r1,
        x2,
        y2,
        d2,
        b2,
        r2,
        x3,
        y3,
        d3,
        b3,
        r3,
        batch,
        source,
        out + target,
        keep,
        pid % split,
        split,
        BD0,
        BD1,
        BD2,
        BD3,
        TENSORS,
    )


@triton.jit(do_not_specialize=["n", "k", "steps", "blocks", "split"])
def unprune_kernel(idx, g, y, d, b, r, n, k, steps, blocks, split, ROWS: tl.constexpr, BD: tl.constexpr):
    """Every output row looks for itself in the ascending indices: no atomics, and dropped rows are written as
    zeros.
    """
    pid = tl.program_id(0)
    s = (pid // (blocks * split)).to(tl.int64)
    row = pid // split % blocks * ROWS + tl.arange(0, ROWS)
    low = tl.zeros([ROWS], tl.int32)
    high = low + k
    for _ in range(0, steps):
        middle = (low + high) >> 1
        less = tl.load(idx + s * k + middle, mask=low < high, other=0) < row
        low = tl.where((low < high) & less, middle + 1, low)
        high = tl.where((low < high) & (less == 0), middle, high)
    found = (tl.load(idx + s * k + low, mask=low < k, other=-1) == row) & (row < n)
    source = s * b + low.to(tl.int64) * r
    target = (s * n + row) * d
    for column in range(pid % split * BD, d, split * BD):
        at = column + tl.arange(0, BD)
        inside = (at < d)[None, :]
        value = tl.load(g + source[:, None] + at[None, :], mask=found[:, None] & inside, other=0)
        tl.store(y + target[:, None] + at[None, :], value, mask=(row < n)[:, None] & inside)
