# SPDX-License-Identifier: Apache-2.0
"""Launchers of the selection kernels. Inputs are validated by the caller; outputs are contiguous, indices
int32 ascending.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .triton_large import BINS, CHUNK, compact_kernel, histogram_kernel
from .triton_launch import MAX_BLOCK, block_of, launch, warps
from .triton_select import select_kernel

Parts = tuple[Tensor, int, int]


def parts_of(scores: Tensor) -> Parts:
    """Contiguous scores, the number of partial scores to add up, and the distance between them."""
    scores = scores.contiguous()
    return (scores, scores.shape[0], scores.stride(0)) if scores.ndim == 3 else (scores, 1, 0)


def topk_select(scores: Tensor, k: int) -> Tensor:
    """(B, min(k, N)) indices of the highest of scores (B, N), or of partial scores (R, B, N) summed in their
    order.
    """
    batch, n = scores.shape[-2:]
    k = min(k, n)
    idx = torch.empty(batch, k, dtype=torch.int32, device=scores.device)
    if k:
        select(parts_of(scores), idx, (idx, idx, idx), batch, n, k, n, False)
    return idx


def topk_select_varlen(
    scores: Tensor, cu_n: Tensor, k: Tensor, cu_k: Tensor, total_k: int, max_n: int
) -> Tensor:
    """(total_k,) indices within their segment, of packed scores (T,); segment s is cu_n[s]:cu_n[s+1] and
    keeps k[s].
    """
    idx = torch.empty(total_k, dtype=torch.int32, device=scores.device)
    if total_k:
        select((scores.contiguous(), 1, 0), idx, (cu_n, k, cu_k), k.shape[0], 0, 0, max_n, True)
    return idx


def select(
    parts: Parts,
    idx: Tensor,
    segments: tuple[Tensor, ...],
    count: int,
    n: int,
    k: int,
    max_n: int,
    varlen: bool,
) -> None:
    """``segments``: where they start, what they keep, and where that starts, if ``varlen``."""
    scores, number, stride = parts
    if max_n <= MAX_BLOCK:
        block = block_of(max_n)
        launch(
            select_kernel,
            count,
            scores,
            idx,
            *segments,
            n,
            k,
            number,
            stride,
            block,
            varlen,
            num_warps=warps(block),
        )
        return
    chunks = -(-max_n // CHUNK)
    hist = torch.zeros(count, 3, BINS, dtype=torch.int32, device=scores.device)
    shape = (*segments, n, k, number, stride, chunks)
    for digit in range(3):
        launch(
            histogram_kernel, count * chunks, scores, hist, *shape, digit, CHUNK, BINS, varlen, num_warps=8
        )
    launch(compact_kernel, count * chunks, scores, hist, idx, *shape, CHUNK, BINS, varlen, num_warps=8)
