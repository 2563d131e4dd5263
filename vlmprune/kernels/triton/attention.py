# SPDX-License-Identifier: Apache-2.0
"""Scores by one row of attention.

No atomics: heads are summed in their order, and where heads are split among programs, selection adds the
partial scores up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, next_power_of_2

_KEYS = 64  # of a program
_PROGRAMS = 132

# --- device ---------------------------------------------------------------------------------------


@triton.jit
def logits_of(
    q,
    k,
    head,
    at,
    valid,
    group,
    q_head,
    k_row,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    UP: tl.constexpr,
):
    """(GROUP, keys) logits of the query heads that share key head ``k``, for the keys ``at`` (int64)."""
    width = tl.arange(0, WIDTH)
    mine = tl.arange(0, GROUP)
    query = tl.load(
        q + (head * group + mine)[:, None] * (q_head * UNIT) + width[None, :],
        mask=(mine < group)[:, None] & (width < D)[None, :],
        other=0.0,
    )
    key = tl.load(
        k + at[:, None] * (k_row * UNIT) + width[None, :],
        mask=valid[:, None] & (width < D)[None, :],
        other=0.0,
    )
    if UP:
        query = query.to(tl.float32)
        key = key.to(tl.float32)
    # no TF32: it would swap tokens whose scores differ in later digits
    return tl.dot(query, tl.trans(key), input_precision="ieee") * scale


@triton.jit(do_not_specialize=["v0", "nv", "heads", "group", "splits", "blocks"])
def attn_row_kernel(
    q,
    k,
    lse,
    out,
    v0,
    nv,
    heads,
    group,
    splits,
    blocks,
    scale,
    share,
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_row,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    UP: tl.constexpr,
):
    """``heads``: key heads of a program. Partial scores (splits, B, nv)."""
    b = (tl.program_id(0) // (splits * blocks)).to(tl.int64)
    split = tl.program_id(0) // blocks % splits
    key = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS)
    valid = key < nv
    at = (v0 + key).to(tl.int64)
    q += b * (q_batch * UNIT)
    k += b * (k_batch * UNIT) + split.to(tl.int64) * heads * (k_head * UNIT)
    lse += b * splits * heads * group
    mine = tl.arange(0, GROUP)
    total = tl.zeros([KEYS], tl.float32)
    for head in range(split * heads, split * heads + heads):
        logits = logits_of(q, k, head, at, valid, group, q_head, k_row, scale, GROUP, D, WIDTH, UNIT, UP)
        # heads that only fill up the tile: exp(0 - inf) is 0, so they add nothing
        norm = tl.load(lse + head * group + mine, mask=mine < group, other=float("inf")).to(tl.float32)
        total += tl.sum(tl.exp(logits - norm[:, None]), 0)
        k += k_head * UNIT
    batch = tl.num_programs(0) // (splits * blocks)
    tl.store(out + (split * batch + b) * nv + key, total * share, mask=valid)


@triton.jit(do_not_specialize=["v0", "nv", "keys", "heads", "group", "blocks"])
def attn_logits_kernel(
    q,
    k,
    logits,
    most,
    total,
    v0,
    nv,
    keys,
    heads,
    group,
    blocks,
    scale,
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_row,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    UP: tl.constexpr,
):
    """Logits (B, H, nv) of the columns asked for; largest, and sum of exponentials (B, H, blocks) of all."""
    b = (tl.program_id(0) // (heads * blocks)).to(tl.int64)
    head = tl.program_id(0) // blocks % heads
    block = tl.program_id(0) % blocks
    key = block * KEYS + tl.arange(0, KEYS)
    valid = key < keys
    q += b * (q_batch * UNIT)
    k += b * (k_batch * UNIT) + head.to(tl.int64) * (k_head * UNIT)
    found = logits_of(
        q, k, head, key.to(tl.int64), valid, group, q_head, k_row, scale, GROUP, D, WIDTH, UNIT, UP
    )
    found = tl.where(valid[None, :], found, -float("inf"))
    mine = tl.arange(0, GROUP)
    row = (b * heads + head) * group + mine
    asked = (key >= v0) & (key < v0 + nv)
    mask = (mine < group)[:, None] & asked[None, :]
    tl.store(logits + row[:, None] * nv + (key - v0)[None, :], found, mask=mask)
    # sums relative to the block's largest logit cannot overflow; the next launch brings them to one scale
    top = tl.max(found, 1)
    tl.store(most + row * blocks + block, top, mask=mine < group)
    tl.store(total + row * blocks + block, tl.sum(tl.exp(found - top[:, None]), 1), mask=mine < group)


@triton.jit(do_not_specialize=["nv", "heads", "blocks", "columns"])
def attn_combine_kernel(
    logits, most, total, out, nv, heads, blocks, columns, share, KEYS: tl.constexpr, BLOCKS: tl.constexpr
):
    b = (tl.program_id(0) // columns).to(tl.int64)
    key = tl.program_id(0) % columns * KEYS + tl.arange(0, KEYS)
    lane = tl.arange(0, BLOCKS)
    logits += b * heads * nv
    most += b * heads * blocks
    total += b * heads * blocks
    scores = tl.zeros([KEYS], tl.float32)
    for _ in range(0, heads):
        tops = tl.load(most + lane, mask=lane < blocks, other=-float("inf"))
        top = tl.max(tops, 0)
        weight = tl.sum(tl.exp(tops - top) * tl.load(total + lane, mask=lane < blocks, other=0.0), 0)
        scores += tl.exp(tl.load(logits + key, mask=key < nv, other=-float("inf")) - top) / weight
        logits += nv
        most += blocks
        total += blocks
    tl.store(out + b * nv + key, scores * share, mask=key < nv)


# --- host -----------------------------------------------------------------------------------------


def attn_row_scores(q: Tensor, k: Tensor, lse: Tensor | None, v0: int, nv: int, scale: float) -> Tensor:
    """(R, B, nv) parts whose sum is the attention of one query to keys v0 .. v0+nv-1, mean over heads.

    Args:
        q: (B, H, d).
        k: (B, Hk, S, d).
        lse: (B, H) log-sum-exp of the whole row, which saves a launch.
        v0, nv, scale: columns, and what logits are multiplied by.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    group, d = q.shape[1] // k.shape[1], q.shape[2]
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2)
    # Triton infers divisibility by 16 only; a head size of 72 still allows loads of 8 elements
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    # the interpreter takes the bits of half precision for integers in tl.dot
    up = q.dtype != k.dtype or (
        q.dtype != torch.float32 and q.device.type == "cpu" and triton.knobs.runtime.interpret
    )
    # tl.dot takes no side below 16
    tile = _KEYS, max(16, next_power_of_2(group)), d, max(16, next_power_of_2(d)), unit, up
    shape = *(stride // unit for stride in strides), *tile
    if lse is None:
        return _over_all_keys(q, k, v0, nv, scale, shape)
    return _by_known_sums(q, k, lse, v0, nv, scale, shape)


def _by_known_sums(
    q: Tensor, k: Tensor, lse: Tensor, v0: int, nv: int, scale: float, shape: tuple[int, ...]
) -> Tensor:
    """One launch: each program sees only the keys asked for."""
    batch, heads = q.shape[:2]
    key_heads, columns = k.shape[1], -(-nv // _KEYS)
    splits = _splits(key_heads, batch * columns)
    out = torch.empty(splits, batch, nv, dtype=torch.float32, device=q.device)
    sizes = v0, nv, key_heads // splits, heads // key_heads, splits, columns, float(scale), 1.0 / heads
    args = q, k, lse.contiguous(), out, *sizes, *shape
    launch(attn_row_kernel, batch * splits * columns, *args, num_warps=4)
    return out


def _over_all_keys(q: Tensor, k: Tensor, v0: int, nv: int, scale: float, shape: tuple[int, ...]) -> Tensor:
    """Two launches: logits with the sums of each block of keys, then the weights."""
    batch, heads = q.shape[:2]
    key_heads, keys = k.shape[1:3]
    blocks, columns = -(-keys // _KEYS), -(-nv // _KEYS)
    logits = torch.empty(batch, heads, nv, dtype=torch.float32, device=q.device)
    # one allocation for both
    most, total = torch.empty(2, batch, heads, blocks, dtype=torch.float32, device=q.device).unbind()
    out = torch.empty(1, batch, nv, dtype=torch.float32, device=q.device)
    sizes = v0, nv, keys, key_heads, heads // key_heads, blocks, float(scale)
    args = q, k, logits, most, total, *sizes, *shape
    launch(attn_logits_kernel, batch * key_heads * blocks, *args, num_warps=4)
    tile = _KEYS, max(16, next_power_of_2(blocks))
    rest = nv, heads, blocks, columns, 1.0 / heads, *tile
    launch(attn_combine_kernel, batch * columns, logits, most, total, out, *rest, num_warps=1)
    return out


def _splits(heads: int, programs: int) -> int:
    """Parts into which key heads are split to keep the GPU busy; at most 8, which selection adds up."""
    possible = [parts for parts in (1, 2, 4, 8) if heads % parts == 0]
    return next((parts for parts in possible if parts * programs >= _PROGRAMS), possible[-1])
