# SPDX-License-Identifier: Apache-2.0
"""The baselines that every method has to beat: all tokens, none, a random subset, a grid, its averages, and
a smaller picture.

    dense:   score_i = 1
    blind:   no token stays
    random:  score_i ~ U(0, 1)
    uniform: the token nearest to the centre of each of k near-square cells of the grid
             (whole=true: all tokens of the fewest blocks, evenly spread, that hold k)
    pool:    y_c = mean of x_i over the tokens i of cell c
    downsample: the picture at the size that gives r x c <= k tokens, r / c as near to its own shape as can be

Deviations: there is no paper. Provenance: written for this package; no code was read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_int, one_of
from ..core.grid import cells, centres
from ..core.method import Counts, Merged, Method, SlotName, What
from ..core.tokens import VisualTokens
from ..registry import register

_AT_ONCE = 2**24  # weights of cells and tokens that are held together


@register("dense")
@dataclass(frozen=True)
class Dense(Method):
    """Keeps every token: the unpruned model, under the same hooks and the same report as all methods."""

    budgeted: ClassVar[bool] = False

    def score(self, tokens: VisualTokens) -> Tensor:
        return torch.ones(tokens.batch, tokens.count, device=tokens.device)


@register("blind")
@dataclass(frozen=True)
class Blind(Method):
    """Keeps nothing of any picture: what the question alone gives away."""

    counts: ClassVar[Counts] = "own"

    def own(self, tokens: VisualTokens) -> Tensor:
        return torch.zeros(tokens.batch, tokens.count, dtype=torch.bool, device=tokens.device)

    def least(self, count: int) -> int:
        return 0


@register("random")
@dataclass(frozen=True)
class Random(Method):
    """Keeps a random subset that depends on the seed, the number of the image in its sample, and N alone.

    Without ``tokens.ordinal`` the rows are taken for the images of one sample.

    Args:
        seed: run several (0, 1, 2, ...) and report the band.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        check_int("seed", self.seed, least=0, most=2**32 - 1)

    def score(self, tokens: VisualTokens) -> Tensor:
        ordinal = range(tokens.batch) if tokens.ordinal is None else tokens.ordinal.tolist()
        return torch.stack([self._row(i, tokens.count) for i in ordinal])

    def _row(self, ordinal: int, n: int) -> Tensor:
        # on the CPU, so that all devices keep the same tokens; the prime keeps (seed, ordinal) pairs apart
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + ordinal)
        return torch.rand(n, generator=generator)


@register("uniform")
@dataclass(frozen=True)
class Uniform(Method):
    """Keeps the token nearest to the centre of each of k near-square cells of the grid.

    Args:
        whole: keep few blocks whole, evenly spread, and not some tokens of each: of a clip, fewer frames.
            What is left of the budget for the last of them is a grid in it.
    """

    whole: bool = False

    nested: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_of("whole", self.whole, (True, False))

    def select(self, tokens: VisualTokens, k: int) -> Tensor:
        grids = tokens.need("grids")
        kept = whole_blocks(grids, k) if self.whole else centres(grids, k)
        return kept.expand(tokens.batch, k)


def whole_blocks(grids: Sequence[tuple[int, int]], k: int) -> Tensor:
    """(k,) ascending tokens of the fewest evenly spread blocks that hold k; the last gives what is left."""
    sizes = [rows * cols for rows, cols in grids]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    few, total = 1, len(sizes)
    while sum(sizes[i] for i in _spread(few, total)) < k:
        few += 1
    found: list[Tensor] = []
    left = k
    for i in _spread(few, total):
        if left:
            # with as many cells as tokens every token is the centre of one: a whole block
            found.append(starts[i] + centres([grids[i]], min(left, sizes[i])))
            left -= min(left, sizes[i])
    return torch.cat(found)


def _spread(few: int, total: int) -> list[int]:
    """The blocks in the middle of so many equal parts."""
    return [(2 * i + 1) * total // (2 * few) for i in range(few)]


@register("pool")
@dataclass(frozen=True)
class Pool(Method):
    """Replaces the tokens of each of k near-square cells by their mean, placed at the centre of the cell."""

    nested: ClassVar[bool] = False
    needs: ClassVar[tuple[What, ...]] = ("features",)

    def merge(self, tokens: VisualTokens, k: int) -> Merged:
        x, grids = tokens.need("features"), tokens.need("grids")  # x: (B, N, D)
        number, start = cells(grids, k), 0
        found: list[Tensor] = []
        # a long clip goes frame by frame: weights of all cells and tokens would not fit into memory
        sizes = [rows * cols for rows, cols in grids] if k * len(number) > _AT_ONCE else [len(number)]
        for size in sizes:
            own = number[start : start + size]
            last = int(own.max())
            if last >= 0:  # a frame may have no cell
                # cells are numbered through all blocks; those of earlier frames are made already
                first = sum(one.shape[1] for one in found)
                member = own == torch.arange(first, last + 1)[:, None]  # (cells, size)
                # rows sum to 1, so that the product below is the mean of a cell
                weight = (member / member.sum(1, keepdim=True)).to(tokens.device)
                # not by index_add, which is not deterministic on CUDA
                found.append(weight @ x[:, start : start + size].float())  # (B, cells, D)
            start += size
        y = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        slots = centres(grids, k).to(tokens.device).expand(tokens.batch, k)
        batch = tokens.batch
        return Merged(y.to(x.dtype), slots, joins=lambda: number.expand(batch, -1))


@register("downsample")
@dataclass(frozen=True)
class Downsample(Method):
    """Shrinks the picture before the processor reads it, so that the model makes fewer tokens of it.

    The vision tower reads less, too. For models that read pictures of any size, such as Qwen-VL, and for
    those that cut them into tiles, such as InternVL.
    """

    slot: ClassVar[SlotName] = "picture"
    nested: ClassVar[bool] = False

    def shrink(self, grid: tuple[int, int], k: int) -> tuple[int, int]:
        rows, cols = grid
        if k >= rows * cols:
            return grid
        tall = math.sqrt(k * rows / cols)  # rows of a grid of the same shape with k tokens
        # the rows below and above it, each with all the columns that k allows
        near = [min(max(1, whole), rows, k) for whole in (math.floor(tall), math.ceil(tall))]
        found = [(r, min(k // r, cols)) for r in near]
        # the one whose shape is nearest, by the logarithm: half as tall is as far off as twice as tall
        return min(found, key=lambda one: abs(math.log(one[0] * cols / (one[1] * rows))))
