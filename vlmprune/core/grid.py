# SPDX-License-Identifier: Apache-2.0
"""Partitions of a token grid into exactly k near-square cells: the geometry behind ``uniform`` and ``pool``.

One grid of R x C tokens gets r row bands, r chosen so that cells come out as square as possible; band i gets
floor((i+1)k/r) - floor(ik/r) columns, so the cells number exactly k for every 1 <= k <= R*C. All edges are
rounded to whole tokens; a band or column is never narrower than one token, hence no cell is empty.

Several grids share k in proportion to their token counts (largest remainder, ties to the earlier grid). A
grid whose share comes out as zero, which must happen when k is smaller than the number of grids, has no cell:
its tokens carry the id -1.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvariantError, SpecError

CELLS = 2**26  # of the common grid of blocks of unequal sides

Grids = Sequence[tuple[int, int]]


def blocks_of(grid: Any) -> tuple[tuple[int, int], ...]:
    """(rows, cols) of every block of a grid that a user gave: one pair, several of them, or None."""
    if grid is None:
        return ()
    try:
        blocks = [grid] if isinstance(grid[0], int) else list(grid)
        # whole numbers of NumPy and torch as well, and no 2.5
        grids = tuple((operator.index(rows), operator.index(cols)) for rows, cols in blocks)
    except (TypeError, ValueError, LookupError) as error:
        raise SpecError(f"grid={grid!r}; expected (rows, cols) or several of them") from error
    if any(rows < 1 or cols < 1 for rows, cols in grids):
        raise SpecError(f"grid={grid!r} has an empty side; expected positive rows and columns")
    return grids


def cells(grids: Grids, k: int) -> Tensor:
    """(N,) int64 cell of every token, 0..k-1 in raster order; -1 for a grid that got no cell."""
    ids, first = [], 0
    for (rows, cols), share in zip(grids, _shares(grids, k), strict=True):
        if share == 0:
            ids.append(torch.full((rows * cols,), -1))
        for top, bottom, edges in _bands(rows, cols, share):
            widths = torch.tensor([right - left for left, right in pairwise(edges)])
            line = torch.repeat_interleave(torch.arange(first, first + len(widths)), widths)  # (C,)
            ids.append(line.repeat(bottom - top))
            first += len(widths)
    return torch.cat(ids)


def centres(grids: Grids, k: int) -> Tensor:
    """(k,) int64 ascending: the token nearest to the centre of each cell, the upper left one of equals."""
    found, start = [], 0
    for (rows, cols), share in zip(grids, _shares(grids, k), strict=True):
        for top, bottom, edges in _bands(rows, cols, share):
            line = start + (top + bottom - 1) // 2 * cols
            found += [line + (left + right - 1) // 2 for left, right in pairwise(edges)]
        start += rows * cols
    return torch.tensor(found)


def boxes(grids: Grids) -> Tensor:
    """(N, 4) float32 x0, y0, x1, y1 of every token; each grid spans [0, 1] both ways."""
    blocks = []
    for rows, cols in grids:
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
        block = torch.stack([x / cols, y / rows, (x + 1) / cols, (y + 1) / rows], dim=-1)
        blocks.append(block.reshape(-1, 4))
    return torch.cat(blocks) if blocks else torch.zeros(0, 4)


def _shares(grids: Grids, k: int) -> list[int]:
    sizes = [rows * cols for rows, cols in grids]
    total = sum(sizes)
    if not 1 <= k <= total or min(sizes) < 1:
        raise InvariantError(
            f"cannot cut grids {tuple(grids)} into {k} cells; expected 1 to {total} cells and no empty grid"
        )
    return shares_of(sizes, k)


def shares_of(sizes: Sequence[int], k: int) -> list[int]:
    """Whole shares of k in proportion to ``sizes``: largest remainder, ties to the earlier; none above its
    size where k is no more than all of them.
    """
    total = max(sum(sizes), 1)
    shares = [k * size // total for size in sizes]
    # only what has a fractional share can receive one more, so no share exceeds its size
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % total))
    for i in by_remainder[: k - sum(shares)]:
        shares[i] += 1
    return shares


def _bands(rows: int, cols: int, k: int) -> Iterator[tuple[int, int, list[int]]]:
    """(top, bottom, column edges) of every row band of one grid cut into k cells."""
    if k == 0:
        return
    fewest = -(-k // cols)  # fewer bands would need columns narrower than a token
    count = min(range(fewest, min(rows, k) + 1), key=lambda r: abs(math.log(rows * k / (r * r * cols))))
    edges = _edges(rows, count)
    for i in range(count):
        yield edges[i], edges[i + 1], _edges(cols, (i + 1) * k // count - i * k // count)


def _edges(length: int, parts: int) -> list[int]:
    return [(2 * i * length + parts) // (2 * parts) for i in range(parts + 1)]


def union_area(blocks: list[np.ndarray]) -> float:
    """Share of the unit square under the true cells of any block, exact, in fractions."""
    edges = [
        sorted({Fraction(i, n) for n in {block.shape[axis] for block in blocks} for i in range(n + 1)})
        for axis in (0, 1)
    ]
    if math.prod(len(edge) - 1 for edge in edges) > CELLS:
        raise SpecError(f"the sides of {len(blocks)} blocks differ too much for an exact area; give cells=8")
    covered = np.zeros([len(edge) - 1 for edge in edges], dtype=bool)
    for block in blocks:
        covered |= block[
            np.ix_(*([int(low * n) for low in edge[:-1]] for edge, n in zip(edges, block.shape, strict=True)))
        ]
    heights, widths = (np.diff(np.array(edge, dtype=object)) for edge in edges)
    return float(heights @ covered.astype(object) @ widths)
