# SPDX-License-Identifier: Apache-2.0
"""Merging into evenly spaced targets: which row each patch becomes part of, and the rows.

Where a target stands is counted anew by every program, which is cheap, so that no program waits for another.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .greedy import rows_contiguous
from .launch import launch, next_power_of_2

_ROWS = 32  # patches of a program
_KEPT = 64  # kept patches looked at together
_COLUMNS = 128  # of a contextual row, in a program

# --- device ---------------------------------------------------------------------------------------


@triton.jit
def rest_at(kept, d, rank, KEPT: tl.constexpr):
    """The patch of this rank among those that are not kept: ``kept`` ascends."""
    lane = tl.arange(0, KEPT)
    before = tl.zeros([KEPT], tl.int32)
    for start in range(0, d, KEPT):
        at = start + lane
        patch = tl.load(kept + at, mask=at < d, other=0).to(tl.int32)
        # so many patches in front of it are not kept
        before += ((at < d) & (patch - at <= rank)).to(tl.int32)
    return rank + tl.sum(before, 0)


@triton.jit
def nearest_target(
    keys,
    kept,
    d,
    contextual,
    step,
    patch,
    valid,
    width,
    row_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
):
    """The number of the target whose key is most like that of each patch; the lower one of equals."""
    # the own key is as long in all cosines of a patch: only the target's length counts
    best = tl.full([ROWS], -float("inf"), tl.float32)
    join = tl.zeros([ROWS], tl.int32)
    for j in range(0, contextual):
        target = rest_at(kept, d, j * step, KEPT).to(tl.int64)
        dot = tl.zeros([ROWS, WIDTH], tl.float32)
        square = tl.zeros([WIDTH], tl.float32)
        for column in range(0, width, WIDTH):
            across = column + tl.arange(0, WIDTH)
            inside = across < width
            theirs = tl.load(keys + target * row_stride + across, mask=inside, other=0.0).to(tl.float32)
            mine = tl.load(
                keys + patch.to(tl.int64)[:, None] * row_stride + across[None, :],
                mask=valid[:, None] & inside[None, :],
                other=0.0,
            ).to(tl.float32)
            dot += mine * theirs[None, :]
            square += theirs * theirs
        length = tl.maximum(tl.sqrt_rn(tl.sum(square, 0)), 1e-12)
        cosine = tl.sum(dot, 1) / length
        # the first of equals is the lower target
        join = tl.where(cosine > best, j, join)
        best = tl.maximum(best, cosine)
    return join


@triton.jit(do_not_specialize=["n", "d", "first", "contextual", "step", "tiles"])
def groups_kernel(
    keys,
    kept,
    slots,
    row,
    n,
    d,
    first,
    contextual,
    step,
    tiles,
    width,
    batch_stride,
    row_stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    KEPT: tl.constexpr,
):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    patch = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    valid = patch < n
    keys += b * batch_stride
    kept += b * d
    slots += b * (first + d + contextual)

    # which of the patches are kept, and how many kept ones are in front of each
    lane = tl.arange(0, KEPT)
    own = tl.zeros([ROWS], tl.int32)
    below = tl.zeros([ROWS], tl.int32)
    for start in range(0, d, KEPT):
        at = start + lane
        other = tl.load(kept + at, mask=at < d, other=0x7FFFFFFF).to(tl.int32)
        own += tl.sum((other[None, :] == patch[:, None]).to(tl.int32), 1)
        below += tl.sum((other[None, :] < patch[:, None]).to(tl.int32), 1)
    is_kept = valid & (own > 0)
    rank = patch - below
    number = rank // step
    is_target = valid & (own == 0) & (number * step == rank) & (number < contextual)

    join = nearest_target(keys, kept, d, contextual, step, patch, valid, width, row_stride, ROWS, WIDTH, KEPT)
    at = tl.where(is_kept, first + below, tl.where(is_target, first + d + number, first + d + join))
    at = tl.where((contextual == 0) & (own == 0), -1, at)
    tl.store(row + b * n + patch, at.to(tl.int64), mask=valid)
    tl.store(slots + at, patch.to(tl.int64), mask=is_kept | is_target)
    if tl.program_id(0) % tiles == 0:
        for start in range(0, first, ROWS):
            front = start + tl.arange(0, ROWS)
            tl.store(slots + front, tl.full([ROWS], -1, tl.int64), mask=front < first)


@triton.jit(do_not_specialize=["n", "rows", "start", "contextual", "blocks"])
def rows_kernel(
    x,
    slots,
    row,
    out,
    n,
    rows,
    start,
    contextual,
    blocks,
    width,
    batch_stride,
    row_stride,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A part of the columns of one contextual row; only what it is made of is read."""
    pid = tl.program_id(0)
    j = pid // blocks % contextual
    b = (pid // (blocks * contextual)).to(tl.int64)
    at = pid % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < width
    x += b * batch_stride
    target = tl.load(slots + b * rows + start + j).to(tl.int64)
    total = tl.zeros([COLUMNS], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for first in range(0, n, ROWS):
        patch = first + tl.arange(0, ROWS)
        joins = tl.load(row + b * n + patch, mask=patch < n, other=-1).to(tl.int32) == start + j
        joins = joins & (patch != target)
        there = joins[:, None] & inside[None, :]
        theirs = tl.load(x + patch.to(tl.int64)[:, None] * row_stride + at[None, :], mask=there, other=0.0)
        total += tl.sum(theirs.to(tl.float32), 0)
        count += joins.to(tl.int32)
    members = tl.sum(count, 0).to(tl.float32)
    own = tl.load(x + target * row_stride + at, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        value = (own + total) / (1 + members)
    else:
        value = own + total / tl.maximum(members, 1.0)
    place = (b * contextual + j) * width + at
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


# --- host -----------------------------------------------------------------------------------------


def contextual_groups(keys: Tensor, kept: Tensor, first: int, contextual: int) -> tuple[Tensor, Tensor]:
    """Slots (B, first + d + c) and rows (B, N) by keys (B, N, C) and kept patches (B, d)."""
    keys, kept = rows_contiguous(keys), kept.contiguous()
    batch, n, width = keys.shape
    d = kept.shape[1]
    slots = torch.empty(batch, first + d + contextual, dtype=torch.int64, device=keys.device)
    row = torch.empty(batch, n, dtype=torch.int64, device=keys.device)
    tiles = -(-n // _ROWS)
    step = max(1, (n - d) // max(1, contextual))
    shape = n, d, first, contextual, step, tiles, width, keys.stride(0), keys.stride(1)
    tile = min(64, max(16, next_power_of_2(width)))
    args = keys, kept, slots, row
    launch(groups_kernel, batch * tiles, *args, *shape, _ROWS, tile, _KEPT, num_warps=4)
    return slots, row


def contextual_rows(features: Tensor, slots: Tensor, row: Tensor, start: int, combine: str) -> Tensor:
    """(B, c, D) contextual rows of features (B, N, D)."""
    features, slots, row = rows_contiguous(features), slots.contiguous(), row.contiguous()
    batch, n, width = features.shape
    rows = slots.shape[1]
    contextual = rows - start
    out = torch.empty(batch, contextual, width, dtype=features.dtype, device=features.device)
    blocks = -(-width // _COLUMNS)
    shape = n, rows, start, contextual, blocks, width, features.stride(0), features.stride(1)
    args = features, slots, row, out
    grid = batch * contextual * blocks
    launch(rows_kernel, grid, *args, *shape, combine == "mean", _ROWS, _COLUMNS, num_warps=4)
    return out
