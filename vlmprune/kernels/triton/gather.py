# SPDX-License-Identifier: Apache-2.0
"""Rows copied by known indices, and the way back.

Up to four tensors ride in one launch, (B, rows, D) or side tensors (B, rows) with D = 1. Widths and strides
must stay specialised: without their divisibility known, copies fall back to two-byte accesses. Offsets are 64
bits wide.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...errors import UnsupportedError
from .device import copy_rows
from .launch import PROGRAMS, SLICE, TILE, launch, next_power_of_2

_TENSORS = 4  # of one launch
_BUSY = 132  # programs that keep a GPU busy
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_PLAIN = _FLOATS | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GATHER_ROWS = 8

# --- device ---------------------------------------------------------------------------------------


# tensor i: width d, strides b of a batch entry and r of a row
@triton.jit(do_not_specialize=["k", "blocks", "split"])
def gather_kernel(
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
    k,
    blocks,
    split,
    ROWS: tl.constexpr,
    BD0: tl.constexpr,
    BD1: tl.constexpr,
    BD2: tl.constexpr,
    BD3: tl.constexpr,
):
    """The slice of output rows of every program."""
    pid = tl.program_id(0)
    b = (pid // (blocks * split)).to(tl.int64)
    part = pid % split
    target = pid // split % blocks * ROWS + tl.arange(0, ROWS)
    keep = target < k
    to = b * k + target
    source = tl.load(idx + to, mask=keep, other=0).to(tl.int64)
    copy_rows(x0, y0, b * b0 + source * r0, to * d0, keep, d0, part, split, BD0)
    copy_rows(x1, y1, b * b1 + source * r1, to * d1, keep, d1, part, split, BD1)
    copy_rows(x2, y2, b * b2 + source * r2, to * d2, keep, d2, part, split, BD2)
    copy_rows(x3, y3, b * b3 + source * r3, to * d3, keep, d3, part, split, BD3)


@triton.jit(do_not_specialize=["n", "k", "steps", "blocks", "split"])
def unprune_kernel(idx, g, y, d, b, r, n, k, steps, blocks, split, ROWS: tl.constexpr, BD: tl.constexpr):
    """Each output row looks for itself in the ascending indices: no atomics; dropped rows become zeros."""
    pid = tl.program_id(0)
    s = (pid // (blocks * split)).to(tl.int64)
    row = pid // split % blocks * ROWS + tl.arange(0, ROWS)
    low = tl.zeros([ROWS], tl.int32)
    high = low + k
    # as many halvings for all lanes, which walk together
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


# --- host -----------------------------------------------------------------------------------------


def plain(x: Tensor) -> Tensor:
    """The same bits in a dtype that kernels can load."""
    # bool and float8 are not loaded everywhere; a copy needs no more than the bits
    if x.dtype in _PLAIN:
        return x
    if x.dtype.itemsize not in _SAME_SIZE:
        raise UnsupportedError(
            f"cannot copy rows of {x.dtype}; view it as a type of 8 bytes, such as torch.view_as_real(x)"
        )
    return x.view(_SAME_SIZE[x.dtype.itemsize])


def flat(x: Tensor) -> Tensor:
    """x (B, rows, *) as (B, rows, D), the numbers of a row of stride 1."""
    x = plain(x)
    x = x.unsqueeze(-1) if x.ndim == 2 else x.flatten(2)
    # batches and rows may be strided, the numbers of a row stand side by side
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


class Rows:
    """Up to four row tensors (B, rows, *) as kernel arguments."""

    def __init__(self, xs: list[Tensor], ys: list[Tensor]) -> None:
        self.flat = [flat(x) for x in xs]
        self.args: list[Tensor | int] = []
        for x, y in zip(self.flat, ys, strict=True):
            self.args += [x, plain(y), x.shape[-1], x.stride(0), x.stride(1)]
        # a kernel has a fixed list of arguments: the first tensor stands for those that are not there
        self.args += self.args[:5] * (_TENSORS - len(xs))
        self.bytes = sum(x.shape[-1] * x.element_size() for x in self.flat)

    def tiles(self, rows: int, warps: int) -> list[int]:
        """Columns of a tile of ``rows`` rows, per tensor; 0 for one that is not there."""
        # in registers; 16 bytes for each thread at least
        tile = TILE if len(self.flat) <= 2 or warps > 8 else TILE // 2
        widths = [min(next_power_of_2(x.shape[-1]), tile // (rows * x.element_size())) for x in self.flat]
        return widths + [0] * (_TENSORS - len(widths))

    def split(self, batch: int, blocks: int, kept: int, tiles: list[int]) -> int:
        """Programs that share the columns of a block of rows, for slices of about SLICE bytes."""
        wanted = max(_BUSY, min(batch * kept * self.bytes // SLICE, PROGRAMS))
        # there are tiles of 0 behind those of the tensors
        most = max(-(-x.shape[-1] // tile) for x, tile in zip(self.flat, tiles, strict=False))
        return max(1, min(most, wanted // max(batch * blocks, 1)))


def outputs(xs: list[Tensor], batch: int, kept: int) -> list[Tensor]:
    return [torch.empty(batch, kept, *x.shape[2:], dtype=x.dtype, device=x.device) for x in xs]


def batches(xs: list[Tensor], ys: list[Tensor]) -> list[Rows]:
    """Tensors that hold anything, four at a time."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y.numel()]
    groups = [pairs[i : i + _TENSORS] for i in range(0, len(pairs), _TENSORS)]
    return [Rows([x for x, _ in group], [y for _, y in group]) for group in groups]


def gather(idx: Tensor, group: Rows) -> None:
    """Copy the rows at idx (B, k)."""
    batch, k = idx.shape
    blocks = -(-k // _GATHER_ROWS)
    tiles = group.tiles(_GATHER_ROWS, 4)
    split = group.split(batch, blocks, k, tiles)
    shape = k, blocks, split, _GATHER_ROWS, *tiles
    launch(gather_kernel, batch * blocks * split, idx, *group.args, *shape, num_warps=4)


def gather_rows(xs: list[Tensor], idx: Tensor) -> list[Tensor]:
    """Rows (B, k, *) of xs (B, N, *) at idx (B, k)."""
    idx = idx.contiguous()
    ys = outputs(xs, *idx.shape)
    for group in batches(xs, ys):
        gather(idx, group)
    return ys


def unprune(g: Tensor, idx: Tensor, n: int) -> Tensor:
    """(B, n, *): rows of g (B, k, *) back at idx (B, k) ascending, zeros elsewhere."""
    idx = idx.contiguous()
    batch, k = idx.shape
    y = torch.empty(batch, n, *g.shape[2:], dtype=g.dtype, device=g.device)
    for group in batches([g], [y]):
        blocks = -(-n // _GATHER_ROWS)
        tiles = group.tiles(_GATHER_ROWS, 4)
        split = group.split(batch, blocks, n, tiles)
        shape = n, k, k.bit_length(), blocks, split, _GATHER_ROWS, tiles[0]
        launch(unprune_kernel, batch * blocks * split, idx, *group.args[:5], *shape, num_warps=4)
    return y
