# SPDX-License-Identifier: Apache-2.0
"""Greedy MAP of a determinantal point process: all picks in one launch, or one launch per pick.

In one launch, a program holds all tokens of a sample in registers and reads its own rows of the decomposition
over and over. More tokens, longer rows and features take a launch per pick.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import RESIDUAL
from .device import best_of, dots, leave, pick_left, place, similarity, value_of
from .greedy import Steps, outputs, rows_contiguous
from .launch import block_of, launch, launch_steps

# bytes of a decomposition that one program reads over and over; a longer one is worth a launch per pick
_HISTORY = 200 * 1024
_BLOCK = 4096  # tokens that one program holds with rows of the decomposition; more spill
_ROWS = 8

# --- device ---------------------------------------------------------------------------------------


@triton.jit
def settled(residual, floor):
    """Residuals that are rounding noise count as 0."""
    return tl.where(residual <= floor, 0.0, residual)


@triton.jit
def new_row(line, explained, left):
    """The next row of the decomposition; zeros where nothing is left to explain."""
    # rounded as IEEE says, as on the CPU: the plain operators may approximate
    root = tl.sqrt_rn(tl.where(left > 0, left, 1.0))
    return tl.where(left > 0, tl.div_rn(line - explained, root + tl.zeros_like(line)), 0.0)


@triton.jit(do_not_specialize=["n", "k"])
def dpp_kernel(
    sim,
    relevance,
    history,
    order,
    gain,
    n,
    k,
    batch_stride,
    row_stride,
    noise,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """history (B, k, BLOCK): rows of the decomposition so far, written and read by this program alone."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    valid = lane < n
    taken = lane >= n
    sim += b * batch_stride
    relevance += b * n
    history += b * k * BLOCK
    own = tl.load(relevance + lane, mask=valid, other=0.0)
    # a step of a row and a column walks down the diagonal
    residual = own * tl.load(sim + lane.to(tl.int64) * (row_stride + 1), mask=valid, other=0.0) * own
    floor = noise * tl.maximum(residual, 0.0)
    residual = settled(residual, floor)
    for step in range(0, k):
        top, pick = best_of(residual, taken, lane)
        left = value_of(top)
        tl.store(order + b * k + step, pick)
        tl.store(gain + b * k + step, left)
        taken = taken | (lane == pick)
        explained = tl.zeros([BLOCK], tl.float32)
        for start in range(0, step, ROWS):
            before = start + tl.arange(0, ROWS)
            there = before < step
            at = before.to(tl.int64) * BLOCK
            picks = tl.load(history + at + pick, mask=there, other=0.0)
            rows = tl.load(history + at[:, None] + lane[None, :], mask=there[:, None], other=0.0)
            explained += tl.sum(rows * picks[:, None], 0)
        row = tl.load(sim + pick.to(tl.int64) * row_stride + lane, mask=valid, other=0.0)
        row = new_row(tl.load(relevance + pick) * row * own, explained, left)
        tl.store(history + step * BLOCK + lane, row)
        residual = settled(residual - row * row, floor)
        tl.debug_barrier()  # other threads of this program read the row


@triton.jit
def with_itself(
    source, token, valid, d, row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, FEATURES: tl.constexpr
):
    """Similarity of every token to itself."""
    mine = token.to(tl.int64)
    if not FEATURES:
        return tl.load(source + mine * (row_stride + 1), mask=valid, other=0.0).to(tl.float32)
    norm = tl.zeros([ROWS, WIDTH], tl.float32)
    for column in range(0, d, WIDTH):
        across = column + tl.arange(0, WIDTH)
        mask = valid[:, None] & (across < d)[None, :]
        row = tl.load(source + mine[:, None] * row_stride + across[None, :], mask=mask, other=0.0)
        norm += row.to(tl.float32) * row.to(tl.float32)
    return tl.sum(norm, 1)


@triton.jit(do_not_specialize=["n", "k", "step", "programs"])
def dpp_step_kernel(
    source,
    relevance,
    residual,
    floor,
    taken,
    history,
    keys,
    tokens,
    order,
    gain,
    n,
    k,
    step,
    programs,
    d,
    batch_stride,
    row_stride,
    history_stride,
    noise,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTIALS: tl.constexpr,
    FEATURES: tl.constexpr,
):
    """history (B, N, at least k), zeros at first: columns of the decomposition, a row for each token."""
    b, token, at = place(n, programs, ROWS)
    valid = token < n
    source += b * batch_stride
    own = tl.load(relevance + at, mask=valid, other=0.0)
    if step == 0:
        itself = with_itself(source, token, valid, d, row_stride, ROWS, WIDTH, FEATURES)
        start = own * itself * own
        least = noise * tl.maximum(start, 0.0)
        start = settled(start, least)
        tl.store(floor + at, least, mask=valid)
        tl.store(residual + at, start, mask=valid)
        tl.store(taken + at, tl.zeros([ROWS], tl.int8), mask=valid)
        leave(keys, tokens, step, start, token >= n, token)
    else:
        pick, left = pick_left(keys, tokens, order, gain, step, k, programs, PARTIALS)
        if step < k:
            row = similarity(source, token, pick, valid, d, row_stride, ROWS, WIDTH, FEATURES)
            history += b * n * history_stride
            mine = token.to(tl.int64)
            # reads whole tiles: columns that no pick has written yet are zero
            used, width = step - 1, history_stride
            explained = dots(history, mine, pick, valid, used, width, width, ROWS, WIDTH)
            row = new_row(tl.load(relevance + b * n + pick) * row * own, explained, left)
            tl.store(history + mine * history_stride + step - 1, row, mask=valid)
            rest = tl.load(residual + at, mask=valid, other=0.0) - row * row
            rest = settled(rest, tl.load(floor + at, mask=valid, other=0.0))
            gone = (tl.load(taken + at, mask=valid, other=1) != 0) | (token == pick)
            tl.store(residual + at, rest, mask=valid)
            tl.store(taken + at, gone.to(tl.int8), mask=valid)
            leave(keys, tokens, step, rest, gone, token)


# --- host -----------------------------------------------------------------------------------------


def greedy_dpp(sim: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Order of picks (B, min(k, N)) by similarities (B, N, N), and the gain of each (B, min(k, N))."""
    batch, n = sim.shape[:2]
    k = min(k, n)
    if n > _BLOCK or 4 * k * n > _HISTORY:
        return _by_steps(sim, relevance, k, features=False)
    sim = rows_contiguous(sim)
    order, gain = outputs(sim, k)
    block = block_of(n)
    history = torch.empty(batch, k, block, dtype=torch.float32, device=sim.device)
    shape = n, k, sim.stride(0), sim.stride(1), RESIDUAL, block, _ROWS
    args = sim, relevance.contiguous(), history, order, gain
    launch(dpp_kernel, batch, *args, *shape, num_warps=8 if block < _BLOCK else 16)
    return order, gain


def greedy_dpp_features(features: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``greedy_dpp`` by inner products of features (B, N, D), in memory for N x k numbers."""
    return _by_steps(features, relevance, min(k, features.shape[1]), features=True)


def _by_steps(source: Tensor, relevance: Tensor, k: int, features: bool) -> tuple[Tensor, Tensor]:
    source = rows_contiguous(source)
    order, gain = outputs(source, k)
    steps = Steps(source)
    # whole tiles, all zero at first: a step reads beyond the picks so far
    width = -(-k // steps.tiles[1]) * steps.tiles[1]
    history = torch.zeros(*source.shape[:2], width, dtype=torch.float32, device=source.device)
    state = steps.state(), steps.state(), steps.taken, history, *steps.left
    args = source, relevance.contiguous(), *state, order, gain
    shape = *steps.sizes(source, k), width, RESIDUAL, *steps.tiles, features
    launch_steps(dpp_step_kernel, steps.grid, k + 1, "step", *args, *shape, num_warps=4)
    return order, gain
