# SPDX-License-Identifier: Apache-2.0
"""Launchers of the kernels that copy rows. Inputs are validated by the caller; outputs are contiguous."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .triton_gather import gather_kernel, prune_kernel, unprune_kernel
from .triton_launch import MAX_BLOCK, PROGRAMS, SLICE, TILE, block_of, launch, next_power_of_2, warps
from .triton_topk import parts_of, select

_TENSORS = 4  # of one launch
_BUSY = 132  # programs that keep a GPU busy
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_PLAIN = _FLOATS | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GATHER_ROWS = 8
Form = Literal["auto", "fused", "two"]


def plain(x: Tensor) -> Tensor:
    """The same bits in a dtype that kernels can load."""
    if x.dtype in _PLAIN:
        return x
    if x.dtype.itemsize not in _SAME_SIZE:
        raise UnsupportedError(
            f"cannot copy rows of {x.dtype}; view it as a type of 8 bytes, such as torch.view_as_real(x)"
        )
    return x.view(_SAME_SIZE[x.dtype.itemsize])


def flat(x: Tensor, lead: int) -> Tensor:
    """x with the dimensions behind the first ``lead`` flattened into one, of stride 1."""
    x = plain(x)
    x = x.unsqueeze(-1) if x.ndim == lead else x.flatten(lead)
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


class Rows:
    """Up to four row tensors as kernel arguments: (B, rows, *), or packed (T, *)."""

    def __init__(self, xs: list[Tensor], ys: list[Tensor], packed: bool) -> None:
        lead = 1 if packed else 2
        self.flat = [flat(x, lead) for x in xs]
        self.args: list = []
        for x, y in zip(self.flat, ys, strict=True):
            self.args += [x, plain(y), x.shape[-1], 0 if packed else x.stride(0), x.stride(-2)]
        self.args += self.args[:5] * (_TENSORS - len(xs))
        self.count = len(xs)
        self.bytes = sum(x.shape[-1] * x.element_size() for x in self.flat)

    def tiles(self, rows: int, warps: int) -> list[int]:
        """Columns of a tile of ``rows`` rows, per tensor."""
        tile = (
            TILE if self.count <= 2 or warps > 8 else TILE // 2
        )  # registers; 16 bytes for each thread at least
        widths = [min(next_power_of_2(x.shape[-1]), tile // (rows * x.element_size())) for x in self.flat]
        return widths + widths[:1] * (_TENSORS - len(widths))

    def split(self, segments: int, blocks: int, kept: int, tiles: list[int]) -> int:
        """Programs that share the columns of a block of rows, for slices of about SLICE bytes."""
        wanted = max(_BUSY, min(segments * kept * self.bytes // SLICE, PROGRAMS))
        most = max(-(-x.shape[-1] // tile) for x, tile in zip(self.flat, tiles, strict=False))
        return max(1, min(most, wanted // max(segments * blocks, 1)))


def fused_rows(segments: int, rows: int) -> int | None:
    """Source rows of a program of the fused kernel; None where so many programs would select anew that two
    launches are less.
    """
    return next((block for block in (16, 32, 64) if segments * -(-rows // block) <= PROGRAMS), None)


def outputs(xs: list[Tensor], lead: tuple[int, ...]) -> list[Tensor]:
    return [torch.empty(*lead, *x.shape[len(lead) :], dtype=x.dtype, device=x.device) for x in xs]


def batches(xs: list[Tensor], ys: list[Tensor], packed: bool) -> list[Rows]:
    """Tensors that hold anything, four at a time."""
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if y.numel()]
    groups = [pairs[i : i + _TENSORS] for i in range(0, len(pairs), _TENSORS)]
    return [Rows([x for x, _ in group], [y for _, y in group], packed) for group in groups]


def prune(
    scores: Tensor, k: int, xs: list[Tensor], pre: int = 0, post: int = 0, form: Form = "auto"
) -> tuple[Tensor, list[Tensor]]:
    """Select by scores (B, N) or partial scores (R, B, N), and copy rows of xs (B, pre+N+post, *).

    Returns:
        idx (B, min(k, N)) and copies (B, pre + min(k, N) + post, *).
    """
    batch, n = scores.shape[-2:]
    k = min(k, n)
    idx = torch.empty(batch, k, dtype=torch.int32, device=scores.device)
    ys = outputs(xs, (batch, pre + k + post))
    run(
        parts_of(scores),
        idx,
        (idx, idx, idx),
        (batch, n, k, n, k),
        (pre, post),
        batches(xs, ys, False),
        False,
        form,
    )
    return idx, ys


def prune_varlen(
    scores: Tensor,
    cu_n: Tensor,
    k: Tensor,
    cu_k: Tensor,
    total_k: int,
    max_n: int,
    xs: list[Tensor],
    form: Form = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """``prune`` of packed scores (T,) and xs (T, *): idx (total_k,) within segments, and copies (total_k,
    *)."""
    idx = torch.empty(total_k, dtype=torch.int32, device=scores.device)
    ys = outputs(xs, (total_k,))
    sizes = (k.shape[0], 0, 0, max_n, min(max_n, total_k))
    run((scores.contiguous(), 1, 0), idx, (cu_n, k, cu_k), sizes, (0, 0), batches(xs, ys, True), True, form)
    return idx, ys


def run(parts, idx, segments, sizes, extra, groups, varlen: bool, form: Form) -> None:
    """Fused launches, or selection and copy apart. ``sizes``: segments, n, k, and the largest n and k of a
    segment.
    """
    count, n, k, max_n, max_k = sizes
    rows = fused_rows(count, max_n + sum(extra))
    rows = (rows or 64) if form == "fused" else rows if form == "auto" else None
    if rows is None or not groups or max_n > MAX_BLOCK:
        if idx.numel():
            select(parts, idx, segments, count, n, k, max_n, varlen)
        for group in groups:
            gather(idx, segments, (count, n, k, max_k), extra, group, varlen)
        return
    block = block_of(max_n)
    blocks = -(-(max_n + sum(extra)) // rows)
    scores, number, stride = parts
    for group in groups:
        tiles = group.tiles(rows, warps(block))
        split = group.split(count, blocks, max_k + sum(extra), tiles)
        shape = (n, k, *extra, number, stride, blocks, split, block, rows, *tiles, group.count, varlen)
        launch(
            prune_kernel,
            count * blocks * split,
            scores,
            idx,
            *segments,
            *group.args,
            *shape,
            num_warps=warps(block),
        )


def gather(idx, segments, sizes, extra, group: Rows, varlen: bool) -> None:
    count, n, k, max_k = sizes
    rows = max_k + sum(extra)
    blocks = -(-rows // _GATHER_ROWS)
    tiles = group.tiles(_GATHER_ROWS, 4)
    split = group.split(count, blocks, rows, tiles)
    shape = (n, k, *extra, blocks, split, _GATHER_ROWS, *tiles, group.count, varlen)
    launch(gather_kernel, count * blocks * split, idx, *segments, *group.args, *shape, num_warps=4)


def gather_rows(xs: list[Tensor], idx: Tensor) -> list[Tensor]:
    """Rows (B, k, *) of xs (B, N, *) at idx (B, k)."""
    idx = idx.contiguous()
    batch, k = idx.shape
    ys = outputs(xs, (batch, k))
    for group in batches(xs, ys, False):
        gather(idx, (idx, idx, idx), (batch, xs[0].shape[1], k, k), (0, 0), group, False)
    return ys


def unprune(g: Tensor, idx: Tensor, n: int) -> Tensor:
    """(B, n, *): rows of g (B, k, *) back at idx (B, k) ascending, zeros elsewhere."""
    idx = idx.contiguous()
    batch, k = idx.shape
    y = torch.empty(batch, n, *g.shape[2:], dtype=g.dtype, device=g.device)
    for group in batches([g], [y], False):
        blocks = -(-n // _GATHER_ROWS)
        tiles = group.tiles(_GATHER_ROWS, 4)
        split = group.split(batch, blocks, n, tiles)
        shape = (n, k, k.bit_length(), blocks, split, _GATHER_ROWS, tiles[0])
        launch(unprune_kernel, batch * blocks * split, idx, *group.args[:5], *shape, num_warps=4)
    return y
