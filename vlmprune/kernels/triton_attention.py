# SPDX-License-Identifier: Apache-2.0
"""Scores by one row of attention, and by the projector's slope: kernels and launchers.

No atomics: heads are summed in their order, and where heads are split among programs, selection adds the
partial scores up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_launch import launch, next_power_of_2

_KEYS = 64  # of a program
_PROGRAMS = 132


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
    """(GROUP, keys) logits of the query heads that share the key head ``k`` points at, of the keys ``at``
    (int64).
    """
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
    """Logits (B, H, nv) of the columns asked for; maximum and sum of exponentials (B, H, blocks) of all
    columns.
    """
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
    tl.store(
        logits + row[:, None] * nv + (key - v0)[None, :], found, mask=(mine < group)[:, None] & asked[None, :]
    )
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


def attn_row_scores(q: Tensor, k: Tensor, lse: Tensor | None, v0: int, nv: int, scale: float) -> Tensor:
    """(R, B, nv) partial scores of ``reference.attn_row_scores``: attention of one query to keys v0 ..
    v0+nv-1, mean over heads.

    Args:
        q: (B, H, d).
        k: (B, Hk, S, d).
        lse: (B, H) log-sum-exp of the whole row, which saves a launch.
        v0, nv, scale: columns, and what logits are multiplied by.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, d = q.shape
    key_heads, keys = k.shape[1:3]
    group = heads // key_heads
    strides = q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2)
    # Triton infers divisibility by 16 only; a head size of 72 still allows loads of 8 elements
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    strides = tuple(stride // unit for stride in strides)
    # the interpreter takes the bits of half precision for integers in tl.dot
    up = q.dtype != k.dtype or (
        q.dtype != torch.float32 and q.device.type == "cpu" and triton.knobs.runtime.interpret
    )
    shape = _KEYS, max(16, next_power_of_2(group)), d, max(16, next_power_of_2(d)), unit, up
    new = {"dtype": torch.float32, "device": q.device}
    columns = -(-nv // _KEYS)
    if lse is not None:
        splits = _splits(key_heads, batch * columns)
        out = torch.empty(splits, batch, nv, **new)
        sizes = v0, nv, key_heads // splits, group, splits, columns, float(scale), 1.0 / heads
        launch(
            attn_row_kernel,
            batch * splits * columns,
            q,
            k,
            lse.contiguous(),
            out,
            *sizes,
            *strides,
            *shape,
            num_warps=4,
        )
        return out
    blocks = -(-keys // _KEYS)
    logits = torch.empty(batch, heads, nv, **new)
    most, total = torch.empty(2, batch, heads, blocks, **new).unbind()
    out = torch.empty(1, batch, nv, **new)
    sizes = v0, nv, keys, key_heads, group, blocks, float(scale)
    launch(
        attn_logits_kernel,
        batch * key_heads * blocks,
        q,
        k,
        logits,
        most,
        total,
        *sizes,
        *strides,
        *shape,
        num_warps=4,
    )
    sizes = nv, heads, blocks, columns, 1.0 / heads, _KEYS, max(16, next_power_of_2(blocks))
    launch(attn_combine_kernel, batch * columns, logits, most, total, out, *sizes, num_warps=1)
    return out


def _splits(heads: int, programs: int) -> int:
    """Into how many parts the key heads are split, so that the GPU is busy; at most 8, which selection adds
    up.
    """
    possible = [parts for parts in (1, 2, 4, 8) if heads % parts == 0]
    return next((parts for parts in possible if parts * programs >= _PROGRAMS), possible[-1])


def zoo_sensitivity(slope: Tensor, kernel: Tensor) -> Tensor:
    """(B, N) g^T K g of slopes g (B, N, H) and a matrix K (H, H)."""
    slope = slope.contiguous()
    product = torch.matmul(slope, kernel)
    width = slope.shape[-1]
    out = torch.empty(slope.shape[:-1], dtype=torch.float32, device=slope.device)
    rows = 4
    tile = min(1024, max(16, next_power_of_2(width)))
    launch(
        row_dot_kernel,
        -(-out.numel() // rows),
        slope,
        product,
        out,
        out.numel(),
        width,
        rows,
        tile,
        num_warps=4,
    )
    return out
