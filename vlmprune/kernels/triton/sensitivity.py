# SPDX-License-Identifier: Apache-2.0
"""Scores by the slope of the projector: a matrix product, and one inner product per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2


@triton.jit(do_not_specialize=["rows"])
def row_dot_kernel(x, y, out, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = row.to(tl.int64) * width
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for column in range(0, width, WIDTH):
        at = column + tl.arange(0, WIDTH)
        mask = (row < rows)[:, None] & (at < width)[None, :]
        left = tl.load(x + start[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
        total += left * tl.load(y + start[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(total, 1), mask=row < rows)


def zoo_sensitivity(slope: Tensor, kernel: Tensor) -> Tensor:
    """(B, N) g^T K g of slopes g (B, N, H) and a matrix K (H, H)."""
    slope = slope.contiguous()
    # the large product is that of the vendor's library; the kernel reads its result once
    product = torch.matmul(slope, kernel)
    width = slope.shape[-1]
    out = torch.empty(slope.shape[:-1], dtype=torch.float32, device=slope.device)
    rows = 4
    tile = min(1024, max(16, next_power_of_2(width)))
    grid = -(-out.numel() // rows)
    launch(row_dot_kernel, grid, slope, product, out, out.numel(), width, rows, tile, num_warps=4)
    return out
