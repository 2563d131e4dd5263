# SPDX-License-Identifier: Apache-2.0
"""Selection and copy in one launch: every program selects anew, which is cheap, and copies its own slice.

No scratch and no second launch. Where so many programs would select anew that two launches are less,
selection and copy stay apart.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import copy_rows, keep_rank, kth_key, load_keys
from .gather import Rows, batches, gather, outputs
from .launch import MAX_BLOCK, PROGRAMS, block_of, launch, warps
from .select import select

Form = Literal["auto", "fused", "two"]

# --- device ---------------------------------------------------------------------------------------


@triton.jit
def kept_rows(scores, idx, b, n, k, at, part, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows from ``at`` on, where each goes, and which are kept; share 0 writes the indices down."""
    lane = tl.arange(0, BLOCK)
    key = load_keys(scores, b * n + lane, lane < n)
    bound = kth_key(key, k)
    above = (key > bound).to(tl.int32)
    equal = (key == bound).to(tl.int32)
    need = k - tl.sum(above, 0)
    # kept tokens in front of this slice: where its own rows go in the output
    before = (lane < at).to(tl.int32)
    above_before = tl.sum(above * before, 0)
    equal_before = tl.sum(equal * before, 0)

    row = at + tl.arange(0, ROWS)
    # loaded again: values in registers cannot be indexed by a slice
    own = load_keys(scores, b * n + row, row < n)
    keep, place = keep_rank(own, bound, need, above_before, equal_before)
    if part == 0:
        tl.store(idx + b * k + place, row, mask=keep)
    return row.to(tl.int64), place, keep


# tensors as in gather_kernel
@triton.jit(do_not_specialize=["n", "k", "blocks", "split"])
def prune_kernel(
    scores,
    idx,
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
    blocks,
    split,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BD0: tl.constexpr,
    BD1: tl.constexpr,
    BD2: tl.constexpr,
    BD3: tl.constexpr,
):
    pid = tl.program_id(0)
    b = (pid // (blocks * split)).to(tl.int64)
    part = pid % split
    at = pid // split % blocks * ROWS
    source, place, keep = kept_rows(scores, idx, b, n, k, at, part, BLOCK, ROWS)
    to = b * k + place
    copy_rows(x0, y0, b * b0 + source * r0, to * d0, keep, d0, part, split, BD0)
    copy_rows(x1, y1, b * b1 + source * r1, to * d1, keep, d1, part, split, BD1)
    copy_rows(x2, y2, b * b2 + source * r2, to * d2, keep, d2, part, split, BD2)
    copy_rows(x3, y3, b * b3 + source * r3, to * d3, keep, d3, part, split, BD3)


# --- host -----------------------------------------------------------------------------------------


def prune(scores: Tensor, k: int, xs: list[Tensor], form: Form = "auto") -> tuple[Tensor, list[Tensor]]:
    """idx (B, min(k, N)) of the highest of scores (B, N), and copies of these rows of xs (B, N, *)."""
    scores = scores.contiguous()
    batch, n = scores.shape
    k = min(k, n)
    idx = torch.empty(batch, k, dtype=torch.int32, device=scores.device)
    ys = outputs(xs, batch, k)
    groups = batches(xs, ys)
    rows = None if form == "two" else fused_rows(batch, n)
    if form == "fused":
        rows = rows or 64
    # too many programs would select anew, there is nothing to copy, or one cannot hold all scores
    if rows is None or not groups or n > MAX_BLOCK:
        select(scores, idx)
        for group in groups:
            gather(idx, group)
    else:
        for group in groups:
            fused(scores, idx, group, rows)
    return idx, ys


def fused_rows(batch: int, n: int) -> int | None:
    """Source rows of a program of the fused kernel; None where it would take too many programs."""
    # fewer rows are more programs, and each of them selects anew
    return next((rows for rows in (16, 32, 64) if batch * -(-n // rows) <= PROGRAMS), None)


def fused(scores: Tensor, idx: Tensor, group: Rows, rows: int) -> None:
    """One launch, of programs for so many source rows each."""
    batch, n = scores.shape
    k = idx.shape[1]
    block = block_of(n)
    blocks = -(-n // rows)
    tiles = group.tiles(rows, warps(block))
    split = group.split(batch, blocks, k, tiles)
    shape = n, k, blocks, split, block, rows, *tiles
    launch(prune_kernel, batch * blocks * split, scores, idx, *group.args, *shape, num_warps=warps(block))
