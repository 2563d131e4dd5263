# SPDX-License-Identifier: Apache-2.0
"""Crops that share a budget: how tokens vary inside one, their scores, quotas, and the best of each crop.

-1 stands only behind the last token of a crop, so that its size is found by bisection.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import crops as plain
from ..crops import EPS, ROUNDED, TINY
from .greedy import rows_contiguous
from .launch import block_of, launch, next_power_of_2

_ROWS = 32  # tokens of a tile
_WIDTH = 16  # columns of features at a time; with 32, Triton 3.6 has too few registers
_GROUPS = 32  # crops whose sizes are found together
_CROPS = 1024  # that one program shares out over; with more, registers spill

# --- device ---------------------------------------------------------------------------------------


@triton.jit
def sizes_at(members, crop, there, width, STEPS: tl.constexpr):
    """Tokens of the crops ``crop``; 0 where there is none."""
    low = tl.zeros_like(crop)
    high = tl.where(there, width, 0)
    for _ in range(0, STEPS):
        middle = (low + high) >> 1
        open = low < high
        real = tl.load(members + crop.to(tl.int64) * width + middle, mask=open, other=-1) >= 0
        low = tl.where(open & real, middle + 1, low)
        high = tl.where(open & ~real, middle, high)
    return low


@triton.jit
def cosines(x, own, other, d, row_stride, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, ROWS) cosines of tokens ``own`` and ``other``; 0 of a token with itself, and where one is -1."""
    dots = tl.zeros([ROWS, ROWS], tl.float32)
    mine = tl.zeros([ROWS], tl.float32)
    theirs = tl.zeros([ROWS], tl.float32)
    for column in range(0, d, WIDTH):
        at = column + tl.arange(0, WIDTH)
        left = tl.load(
            x + own.to(tl.int64)[:, None] * row_stride + at[None, :],
            mask=(own >= 0)[:, None] & (at < d)[None, :],
            other=0.0,
        ).to(tl.float32)
        right = tl.load(
            x + other.to(tl.int64)[:, None] * row_stride + at[None, :],
            mask=(other >= 0)[:, None] & (at < d)[None, :],
            other=0.0,
        ).to(tl.float32)
        # ieee: products of three decimals would spoil small differences of cosines
        dots += tl.dot(left, tl.trans(right), input_precision="ieee")
        mine += tl.sum(left * left, 1)
        theirs += tl.sum(right * right, 1)
    lengths = (tl.sqrt_rn(mine) + eps)[:, None] * (tl.sqrt_rn(theirs) + eps)[None, :]
    return tl.where(own[:, None] == other[None, :], 0.0, dots / lengths)


@triton.jit(do_not_specialize=["crops", "width", "tiles"])
def variance_kernel(
    x,
    members,
    out,
    crops,
    width,
    tiles,
    d,
    batch_stride,
    row_stride,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of a tile of tokens of one crop; the cosines are made twice, since their mean comes first."""
    pid = tl.program_id(0)
    crop = pid // tiles % crops
    b = (pid // (tiles * crops)).to(tl.int64)
    x += b * batch_stride
    members += crop * width
    lane = tl.arange(0, ROWS)
    at = pid % tiles * ROWS + lane
    own = tl.load(members + at, mask=at < width, other=-1).to(tl.int32)
    count = tl.zeros([ROWS], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, ROWS):
        other = tl.load(members + start + lane, mask=start + lane < width, other=-1).to(tl.int32)
        count += (other >= 0).to(tl.int32)
        total += tl.sum(cosines(x, own, other, d, row_stride, eps, ROWS, WIDTH), 1)
    others = tl.maximum(tl.sum(count, 0) - 1, 1).to(tl.float32)
    mean = total / others
    square = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, ROWS):
        other = tl.load(members + start + lane, mask=start + lane < width, other=-1).to(tl.int32)
        off = cosines(x, own, other, d, row_stride, eps, ROWS, WIDTH) - mean[:, None]
        square += tl.sum(tl.where((other >= 0)[None, :], off * off, 0.0), 1)
    value = tl.where(own >= 0, square / others, 0.0)
    tl.store(out + (b * crops + crop) * width + at, value, mask=at < width)


@triton.jit
def attention_at(attention, members, at, width):
    """Attention of the tokens of a crop at ``at``, 0 behind the last one, and which are real."""
    token = tl.load(members + at, mask=at < width, other=-1).to(tl.int64)
    return tl.load(attention + token, mask=token >= 0, other=0.0).to(tl.float32), token >= 0


@triton.jit(do_not_specialize=["n", "crops", "width", "alpha"])
def scores_kernel(
    attention,
    variance,
    members,
    rank,
    mean,
    n,
    crops,
    width,
    alpha,
    eps,
    VARIED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    crop = tl.program_id(0) % crops
    b = (tl.program_id(0) // crops).to(tl.int64)
    attention += b * n
    members += crop * width
    base = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    varied = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):
        a, real = attention_at(attention, members, start + lane, width)
        total += a
        count += real.to(tl.int32)
        if VARIED:
            varied += tl.load(variance + base + start + lane, mask=start + lane < width, other=0.0)
    size = tl.sum(count, 0).to(tl.float32)
    average = tl.sum(total, 0) / size
    if VARIED:
        scale = average / (tl.sum(varied, 0) / size + eps)
    for start in range(0, width, BLOCK):
        a, real = attention_at(attention, members, start + lane, width)
        value = a
        if VARIED:
            value = a + alpha * tl.load(variance + base + start + lane, mask=real, other=0.0) * scale
        tl.store(rank + base + start + lane, tl.where(a < 0, float("nan"), value), mask=start + lane < width)
    tl.store(mean + tl.program_id(0), average)


@triton.jit
def handed_out(left, weights, rooms, weight, room, lane, crops):
    """Of ``left`` tokens: the heaviest crop takes what it has room for, then the next."""
    before = tl.zeros_like(room)
    for other in range(0, crops):
        theirs = tl.load(weights + other)
        # equal ones are served in order
        heavier = (theirs > weight) | ((theirs == weight) & (other < lane))
        before += tl.where(heavier, tl.load(rooms + other), 0)
    return tl.minimum(tl.maximum(left - before, 0), room)


@triton.jit(do_not_specialize=["crops", "width", "k", "tau"])
def share_kernel(
    mass,
    members,
    weights,
    rooms,
    quota,
    crops,
    width,
    k,
    tau,
    tiny,
    eps,
    rounded,
    PAPER: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weights, rooms (B, C): what this program alone leaves to itself."""
    base = tl.program_id(0).to(tl.int64) * crops
    lane = tl.arange(0, BLOCK)
    valid = lane < crops
    size = sizes_at(members, lane, valid, width, STEPS)
    given = tl.load(mass + base + lane, mask=valid, other=0.0).to(tl.float32)
    given = tl.where(given == given, tl.minimum(given, 3.4028234663852886e38), 0.0)
    top = tl.maximum(tl.max(tl.where(valid, given, -float("inf")), 0), tiny)
    part = tl.div_rn(given, top + tl.zeros_like(given))
    # 0 to the power of 0 is 1
    power = tl.where(
        part > 0, tl.exp2(tau * tl.log2(tl.where(part > 0, part, 1.0))), tl.where(tau == 0, 1.0, 0.0)
    )
    weight = tl.where(valid, tl.where(tau == 1, part, power) * top, 0.0)

    whole = tl.sum(weight, 0)
    if PAPER:
        share = tl.div_rn(weight, tl.maximum(whole, tiny) + tl.zeros_like(weight)) * k * rounded
        room = tl.zeros_like(lane) + k
    else:
        share = tl.div_rn(weight, whole + eps + tl.zeros_like(weight)) * k
        room = tl.zeros_like(lane) + 1
    found = tl.floor(share).to(tl.int32)
    tl.store(weights + base + lane, weight, mask=valid)
    tl.store(rooms + base + lane, room, mask=valid)
    tl.debug_barrier()  # other threads of this program read them
    left = k - tl.sum(tl.where(valid, found, 0), 0)
    found += handed_out(left, weights + base, rooms + base, weight, room, lane, crops)

    # what exceeds a crop goes to crops with room, in proportion to weight * room
    over = tl.sum(tl.where(valid, tl.maximum(found - size, 0), 0), 0)
    found = tl.minimum(found, size)
    pull = weight * (size - found).to(tl.float32)
    part = tl.div_rn(pull, tl.maximum(tl.sum(pull, 0), tiny) + tl.zeros_like(pull))
    found += tl.minimum(tl.floor(over.to(tl.float32) * part).to(tl.int32), size - found)
    room = size - found
    tl.debug_barrier()  # all have read the rooms of before
    tl.store(rooms + base + lane, room, mask=valid)
    tl.debug_barrier()
    left = k - tl.sum(tl.where(valid, found, 0), 0)
    found += handed_out(left, weights + base, rooms + base, weight, room, lane, crops)
    tl.store(quota + base + lane, found.to(tl.int64), mask=valid)


@triton.jit(do_not_specialize=["groups", "width", "k", "tiles"])
def best_kernel(
    scores,
    members,
    quota,
    out,
    groups,
    width,
    k,
    tiles,
    STEPS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of members of one group: the rank of each among the others is its place in the output."""
    pid = tl.program_id(0)
    group = pid // tiles % groups
    b = (pid // (tiles * groups)).to(tl.int64)
    out += b * k
    quota += b * groups
    scores += (b * groups + group) * width

    # places that the groups in front take
    lane = tl.arange(0, GROUPS)
    before = tl.zeros([GROUPS], tl.int32)
    for start in range(0, group, GROUPS):
        there = start + lane < group
        size = sizes_at(members, start + lane, there, width, STEPS)
        asked = tl.load(quota + start + lane, mask=there, other=0).to(tl.int32)
        before += tl.maximum(tl.minimum(asked, size), 0)
    first = tl.sum(before, 0)
    # of one group, as a vector of equals: what it shares with others is in one function
    size = tl.max(sizes_at(members, tl.zeros_like(lane) + group, lane < GROUPS, width, STEPS), 0)
    asked = tl.load(quota + group).to(tl.int32)
    taken = tl.maximum(tl.minimum(asked, size), 0)

    at = pid % tiles * ROWS + tl.arange(0, ROWS)
    valid = at < size
    own = tl.load(scores + at, mask=valid, other=0.0).to(tl.float32)
    rank = tl.zeros([ROWS], tl.int32)
    for start in range(0, size, BLOCK):
        beside = start + tl.arange(0, BLOCK)
        other = tl.load(scores + beside, mask=beside < size, other=0.0).to(tl.float32)[None, :]
        mine = own[:, None]
        # NaN after all numbers, the earlier of equals first
        above = (other > mine) | ((mine != mine) & (other == other))
        equal = (other == mine) | ((mine != mine) & (other != other))
        ahead = above | (equal & (beside[None, :] < at[:, None]))
        rank += tl.sum((ahead & (beside < size)[None, :]).to(tl.int32), 1)
    # a group that is taken whole keeps its own order
    rank = tl.where(asked >= size, at, rank)
    place = first + rank
    token = tl.load(members + group * width + at, mask=valid, other=-1).to(tl.int64)
    tl.store(out + place, token, mask=valid & (rank < taken) & (place < k))
    # the last group fills up what all of them leave
    if (group == groups - 1) & (pid % tiles == 0):
        for start in range(first + taken, k, BLOCK):
            rest = start + tl.arange(0, BLOCK)
            tl.store(out + rest, tl.full([BLOCK], -1, tl.int64), mask=rest < k)


# --- host -----------------------------------------------------------------------------------------


def _steps(width: int) -> int:
    """Steps of a bisection over 0 .. width."""
    return width.bit_length() + 1


def crop_variance(features: Tensor, members: Tensor) -> Tensor:
    """(B, C, M) variance of the cosines of features (B, N, D) in crops (C, M)."""
    features, members = rows_contiguous(features), members.contiguous()
    crops, width = members.shape
    batch, _, d = features.shape
    out = torch.empty(batch, crops, width, dtype=torch.float32, device=features.device)
    tiles = -(-width // _ROWS)
    shape = crops, width, tiles, d, features.stride(0), features.stride(1), EPS, _ROWS, _WIDTH
    launch(variance_kernel, batch * crops * tiles, features, members, out, *shape, num_warps=4)
    return out


def crop_scores(
    attention: Tensor, variance: Tensor | None, members: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Scores (B, C, M) and mean attention (B, C) of crops (C, M) by attention (B, N) and variance."""
    attention, members = attention.contiguous(), members.contiguous()
    batch, n = attention.shape
    crops, width = members.shape
    rank = torch.empty(batch, crops, width, dtype=torch.float32, device=attention.device)
    mean = torch.empty(batch, crops, dtype=torch.float32, device=attention.device)
    # a pointer that nothing reads where there is no variance
    varied = rank if variance is None else variance.contiguous()
    block = min(1024, block_of(width))
    shape = n, crops, width, alpha, EPS, variance is not None, block
    launch(scores_kernel, batch * crops, attention, varied, members, rank, mean, *shape, num_warps=4)
    return rank, mean


def share_out(mass: Tensor, members: Tensor, k: int, tau: float, rule: str) -> Tensor:
    """(B, C) quotas of k tokens by the mass (B, C) of crops (C, M)."""
    mass, members = mass.contiguous(), members.contiguous()
    batch, crops = mass.shape
    if crops > _CROPS:  # more than a program holds: the same in plain torch
        return plain.share_out(mass, members, k, tau, rule)
    weights = torch.empty(batch, crops, dtype=torch.float32, device=mass.device)
    rooms = torch.empty(batch, crops, dtype=torch.int32, device=mass.device)
    quota = torch.empty(batch, crops, dtype=torch.int64, device=mass.device)
    block = block_of(crops)
    numbers = members.shape[1], k, tau, TINY, EPS, ROUNDED
    shape = crops, *numbers, rule == "paper", _steps(members.shape[1]), block
    args = mass, members, weights, rooms, quota
    launch(share_kernel, batch, *args, *shape, num_warps=8)
    return quota


def top_k_in_groups(scores: Tensor, members: Tensor, quota: Tensor, k: int) -> Tensor:
    """(B, k) tokens: of every group (G, M) the ``quota`` (B, G) highest of scores (B, G, M)."""
    scores, members, quota = scores.contiguous(), members.contiguous(), quota.contiguous()
    batch, groups, width = scores.shape
    k = min(k, groups * width)
    out = torch.empty(batch, k, dtype=torch.int64, device=scores.device)
    tiles = -(-width // _ROWS)
    block = min(32, max(16, next_power_of_2(width)))
    shape = groups, width, k, tiles, _steps(width), _GROUPS, _ROWS, block
    launch(best_kernel, batch * groups * tiles, scores, members, quota, out, *shape, num_warps=4)
    return out
