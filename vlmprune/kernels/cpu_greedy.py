# SPDX-License-Identifier: Apache-2.0
"""Greedy choices on the CPU: a running state per token, four or five NumPy calls per pick.

From features, the similarities of few tokens are computed once as a matrix. Those of many are computed row by
row where they are needed, in memory that grows with N only. The limit is on N alone, so that a longer walk
begins as a shorter one does.

All products are torch's. NumPy's BLAS has threads of its own, which go on spinning for a while after a
product and take the cores from the model that runs next. So nothing here calls it, neither @ nor dot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .reference import RESIDUAL

GRAM = 4096  # tokens up to which all similarities are held: 64 MB
_BLOCK = 1024  # tokens on a side of the blocks in which nearest neighbours of many are searched
# rows of a matrix in which nearest neighbours are searched at a time, so that they stay in the cache
_ROWS = 64
_LOOK = 16  # leading tokens whose gain of coverage is looked at together, then twice as many

Pick = tuple[int, float]
Numbers = npt.NDArray[np.floating[Any]]
Flags = npt.NDArray[np.bool_]


def greedy_maxmin(
    sim: Tensor, k: int, weight: Tensor | None = None, first: str = "nn"
) -> tuple[Tensor, Tensor]:
    def walk(b: int, k: int) -> Iterator[Pick]:
        matrix = _numbers(sim[b])
        return _maxmin(matrix.__getitem__, lambda: _nearest(matrix), _entry(weight, b), first, len(matrix), k)

    return _each(sim, k, walk)


def greedy_maxmin_features(
    features: Tensor, k: int, weight: Tensor | None = None, first: str = "nn"
) -> tuple[Tensor, Tensor]:
    def walk(b: int, k: int) -> Iterator[Pick]:
        rows = features[b].detach().contiguous()  # (N, D)
        n, own = len(rows), _entry(weight, b)
        if n <= GRAM:
            matrix = _products(rows, rows.T)
            return _maxmin(matrix.__getitem__, lambda: _nearest(matrix), own, first, n, k)
        return _maxmin(lambda j: _products(rows, rows[j]), lambda: _nearest_of_many(rows), own, first, n, k)

    return _each(features, k, walk)


def greedy_dpp(sim: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    def walk(b: int, k: int) -> Iterator[Pick]:
        return _dpp(*_cholesky(_numbers(sim[b]), _numbers(relevance[b]), k), k)

    return _each(sim, k, walk)


def greedy_dpp_features(features: Tensor, relevance: Tensor, k: int) -> tuple[Tensor, Tensor]:
    def walk(b: int, k: int) -> Iterator[Pick]:
        rows, r = features[b].detach().contiguous(), _numbers(relevance[b])
        if len(rows) <= GRAM:
            return _dpp(*_cholesky(_products(rows, rows.T), r, k), k)
        return _dpp(*_gram_schmidt(rows, r, k), k)

    return _each(features, k, walk)


def greedy_cover(
    rows: Tensor, k: int, weight: Tensor | None = None, combine: str = "product"
) -> tuple[Tensor, Tensor]:
    def walk(b: int, k: int) -> Iterator[Pick]:
        # (N, R): a token's column is read again and again, so its numbers stand side by side
        columns = np.ascontiguousarray(_numbers(rows[b]).T)
        return _cover(columns, _entry(weight, b), combine, k)

    # _each reads batch and number of tokens off the first two axes
    return _each(rows[:, :1].transpose(1, 2), k, walk)


def _numbers(x: Tensor) -> Numbers:
    """The same memory."""
    numbers: Numbers = x.detach().numpy()
    return numbers


def _products(rows: Tensor, others: Tensor) -> Numbers:
    return _numbers(torch.matmul(rows, others))


def _entry(values: Tensor | None, b: int) -> Numbers | None:
    return None if values is None else _numbers(values[b])


def _each(like: Tensor, k: int, walk: Callable[[int, int], Iterator[Pick]]) -> tuple[Tensor, Tensor]:
    """Order and worth (B, k) of a walk per sample."""
    batch, k = like.shape[0], min(k, like.shape[1])
    order, worth = torch.empty(batch, k, dtype=torch.int32), torch.empty(batch, k, dtype=like.dtype)
    for b in range(batch):
        with np.errstate(all="ignore"):  # NaN and overflow have their place in the ranking
            picks = list(walk(b, k))
        order[b] = torch.tensor([token for token, _ in picks], dtype=torch.int32)
        worth[b] = torch.tensor([value for _, value in picks], dtype=like.dtype)
    return order, worth


def _best(value: Numbers, taken: Flags) -> int:
    """The token of the largest value that is not taken. Taken ones hold -inf, or NaN."""
    # NumPy's argmax takes NaN for the largest, so that a look at the top shows whether there is any
    token = int(value.argmax())
    top = value[token]
    if top - top == 0:  # finite: all others are smaller, and none is NaN
        return token
    free = np.flatnonzero(~taken)
    numbers = free[~np.isnan(value[free])]
    return int(numbers[value[numbers].argmax()] if len(numbers) else free[0])


# --- max-min --------------------------------------------------------------------------------------


def _maxmin(
    row: Callable[[int], Numbers],
    nearest: Callable[[], Numbers],
    weight: Numbers | None,
    first: str,
    n: int,
    k: int,
) -> Iterator[Pick]:
    """``row`` gives the similarities of a pick, ``nearest`` those of all to their nearest neighbours."""
    taken = np.zeros(n, bool)
    if first == "nn":
        value = 1 - nearest()
        value = value if weight is None else weight * value
    else:
        value = np.ones(n, np.float32) if weight is None else weight
    # the walk writes into it
    weight = None if weight is None else weight.copy()
    step = apart = None  # distance to the last pick, and to the nearest pick
    for _ in range(k):
        token = _best(value, taken)
        yield token, value[token]
        taken[token] = True
        step = np.subtract(1, row(token), out=step)
        apart = step.copy() if apart is None else np.minimum(apart, step, out=apart)
        apart[token] = -np.inf  # and a minimum keeps it there
        if weight is None:
            value = apart
        else:
            weight[token] = 1  # 0 * inf would be NaN
            value = weight * apart


def _nearest(matrix: Numbers) -> Numbers:
    n = len(matrix)
    if n <= 1:
        return np.zeros(n, matrix.dtype)
    found = np.empty(n, matrix.dtype)
    for start in range(0, n, _ROWS):
        # the walk reads the matrix later, so its diagonal must stay
        part = matrix[start : start + _ROWS].copy()
        number = np.arange(len(part))
        part[number, start + number] = -np.inf
        part.max(axis=1, out=found[start : start + _ROWS])
    return found


def _nearest_of_many(rows: Tensor) -> Numbers:
    """Every pair of tokens is compared once, block by block."""
    n = len(rows)
    if n == 1:
        return _numbers(rows.new_zeros(1))
    found = _numbers(rows.new_full((n,), -torch.inf))
    for start in range(0, n, _BLOCK):
        mine = slice(start, start + _BLOCK)
        for other in range(start, n, _BLOCK):
            theirs = slice(other, other + _BLOCK)
            sim = _products(rows[mine], rows[theirs].T)
            if other == start:
                np.fill_diagonal(sim, -np.inf)
            np.maximum(found[mine], sim.max(axis=1), out=found[mine])
            np.maximum(found[theirs], sim.max(axis=0), out=found[theirs])
    return found


# --- coverage -------------------------------------------------------------------------------------


def _cover(columns: Numbers, weight: Numbers | None, combine: str, k: int) -> Iterator[Pick]:
    """``columns`` (N, R) hold how well each token covers the rows.

    Gains only fall from pick to pick, rounded sums included, so that an old value is an upper bound: a token
    is looked at again only when it leads or nearly does, and picked when it leads by a value of this step.
    """
    n = len(columns)
    taken, best, seen = np.zeros(n, bool), np.zeros(columns.shape[1], columns.dtype), np.zeros(n, np.int64)

    def worth(some: Any) -> Numbers:
        gain = np.maximum(columns[some] - best, 0).sum(axis=1)
        if weight is None:
            return gain
        return gain * weight[some] if combine == "product" else gain + weight[some]

    value = worth(slice(None))
    for step in range(k):
        token, look = _best(value, taken), _LOOK
        while seen[token] != step:
            # many at once, since a call costs as much as the sums of some ten tokens
            some = value.argpartition(-look)[-look:] if look < n else np.arange(n)
            some[0] = token  # may be none of them, where more are NaN
            value[some], seen[some] = worth(some), step
            value[taken] = -np.inf
            token, look = _best(value, taken), 2 * look
        yield token, value[token]
        taken[token], value[token] = True, -np.inf
        best = np.maximum(best, columns[token], out=best)


# --- determinantal point process ------------------------------------------------------------------

Part = Callable[[int, Numbers], Numbers]


def _dpp(residual: Numbers, part: Part, k: int) -> Iterator[Pick]:
    """``part`` gives of all tokens the part that a pick explains; its square leaves the residual."""
    taken = np.zeros(len(residual), bool)
    floor = RESIDUAL * np.maximum(residual, 0)
    residual[residual <= floor] = 0
    for _ in range(k):
        token = _best(residual, taken)
        left = residual[token]
        yield token, left
        taken[token] = True
        if left > 0:
            explained = part(token, residual)
            residual -= explained * explained
            residual[residual <= floor] = 0
        # last, because the floor above lifts what is below it to 0, taken tokens as well
        residual[taken] = -np.inf


def _cholesky(sim: Numbers, relevance: Numbers, k: int) -> tuple[Numbers, Part]:
    # one memory, seen by torch, which multiplies, and by NumPy, which does the small steps
    rows = torch.empty(k, len(sim), dtype=torch.from_numpy(sim).dtype)  # of the decomposition
    shared, filled = _numbers(rows), 0

    def part(token: int, residual: Numbers) -> Numbers:
        nonlocal filled
        before = rows[:filled]
        line = relevance[token] * sim[token] * relevance
        # the residual of the pick is above zero: _dpp asks for a part only then
        shared[filled] = (line - _products(before[:, token], before)) / np.sqrt(residual[token])
        filled += 1
        return shared[filled - 1]

    return relevance * sim.diagonal() * relevance, part


def _gram_schmidt(features: Tensor, relevance: Numbers, k: int) -> tuple[Numbers, Part]:
    """The same without a matrix: a token's part along the new direction is its entry of the Cholesky row."""
    width = features.shape[1]
    basis = features.new_empty(min(k, width), width)
    filled = 0

    def part(token: int, residual: Numbers) -> Numbers:
        nonlocal filled
        if filled == len(basis):  # as many directions as dimensions explain everything
            return np.sqrt(residual)
        before, direction = basis[:filled], features[token]
        for _ in range(2):  # once leaves rounding errors that grow with every pick
            direction = direction - (before @ direction) @ before
        basis[filled] = direction / torch.linalg.vector_norm(direction)
        filled += 1
        return relevance * _products(features, basis[filled - 1])

    itself = _numbers(torch.linalg.vecdot(features, features))
    return relevance * itself * relevance, part
