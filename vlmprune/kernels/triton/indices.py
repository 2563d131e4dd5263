# SPDX-License-Identifier: Apache-2.0
"""Indices put in order by counting: each looks at all others, so that no program waits for another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2

_ROWS = 32  # indices or slots of a program

# --- device ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["k", "least", "n", "tiles"])
def ordered_kernel(idx, ascending, trouble, k, least, n, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    base = (tl.program_id(0) // tiles).to(tl.int64) * k
    at = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    valid = at < k
    own = tl.load(idx + base + at, mask=valid, other=0).to(tl.int64)
    rank = tl.zeros([ROWS], tl.int32)
    again = tl.zeros([ROWS], tl.int32)
    for start in range(0, k, BLOCK):
        beside = start + tl.arange(0, BLOCK)
        there = (beside < k)[None, :]
        other = tl.load(idx + base + beside, mask=beside < k, other=0).to(tl.int64)[None, :]
        same = (other == own[:, None]) & (beside[None, :] < at[:, None])
        rank += tl.sum((there & ((other < own[:, None]) | same)).to(tl.int32), 1)
        again += tl.sum((there & same).to(tl.int32), 1)
    wrong = (own < least) | (own >= n) | ((again > 0) & (own >= 0))
    tl.store(ascending + base + rank, own, mask=valid)
    tl.store(trouble + base + rank, tl.where(wrong, float("inf"), 0.0), mask=valid)


@triton.jit(do_not_specialize=["k", "n", "tiles"])
def host_kernel(idx, slots, k, n, tiles, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    b = (tl.program_id(0) // tiles).to(tl.int64)
    slot = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    taken = tl.zeros([ROWS], tl.int32)
    before = tl.zeros([ROWS], tl.int32)  # taken slots in front of each
    placeless = tl.zeros([BLOCK], tl.int32)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < k
        index = tl.load(idx + b * k + at, mask=there, other=0).to(tl.int32)
        inside = there & (index >= 0) & (index < n)
        placeless += (there & ~inside).to(tl.int32)
        real = inside[None, :]
        taken += tl.sum((real & (index[None, :] == slot[:, None])).to(tl.int32), 1)
        before += tl.sum((real & (index[None, :] < slot[:, None])).to(tl.int32), 1)
    wanted = tl.sum(placeless, 0)
    free = slot - before  # free slots in front of each
    hosts = (slot < n) & ((taken > 0) | (free < wanted))
    place = before + tl.minimum(free, wanted)
    tl.store(slots + b * k + place, slot.to(tl.int64), mask=hosts & (place < k))


# --- host -----------------------------------------------------------------------------------------


def _block(k: int) -> int:
    return min(64, max(16, next_power_of_2(k)))


def ordered_indices(idx: Tensor, least: int, n: int) -> tuple[Tensor, Tensor]:
    """idx (B, K) ascending, and (B, K) what is wrong with each."""
    idx = idx.contiguous()
    batch, k = idx.shape
    ascending = torch.empty(batch, k, dtype=torch.int64, device=idx.device)
    trouble = torch.empty(batch, k, dtype=torch.float32, device=idx.device)
    tiles = -(-k // _ROWS)
    shape = k, least, n, tiles, _ROWS, _block(k)
    launch(ordered_kernel, batch * tiles, idx, ascending, trouble, *shape, num_warps=4)
    return ascending, trouble


def host_slots(idx: Tensor, n: int) -> Tensor:
    """(B, K) ascending slots of idx (B, K), with free ones for each -1."""
    idx = idx.contiguous()
    batch, k = idx.shape
    # repeated slots, which are refused later, leave places empty that are read before
    slots = torch.empty(batch, k, dtype=torch.int64, device=idx.device).zero_()
    tiles = -(-n // _ROWS)
    launch(host_kernel, batch * tiles, idx, slots, k, n, tiles, _ROWS, _block(k), num_warps=4)
    return slots
