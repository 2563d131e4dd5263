# SPDX-License-Identifier: Apache-2.0
"""Calls of the kernels that every implementation must answer as ``vlmprune.kernels.reference`` does, on any
device.

    for case in CASES: check(case, implementation)    # of kernel_check; a module with functions of these
        names

Greedy cases use numbers whose products and sums are exact, so that the order of picks may be compared: one
unit in the last place changes all later picks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_check import KernelCase
from torch import Tensor

KINDS = ("normal", "ties", "equal", "special", "bf16")


# --- selection ------------------------------------------------------------------------------------


def scores(kind: str, batch: int, n: int) -> Tensor:
    """(B, N)."""
    s = torch.randn(batch, n)
    if kind == "ties":
        return s.round()
    if kind == "equal":
        return torch.full_like(s, 0.25)
    if kind == "bf16":
        return s.softmax(-1).bfloat16()
    if kind == "special":
        nan, inf = float("nan"), float("inf")
        values = torch.tensor(
            [nan, -nan, nan, -nan, nan, -nan, inf, -inf, 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38]
        )
        return torch.where(torch.rand(batch, n) < 0.7, values[torch.randint(len(values), (batch, n))], s)
    return s


def selections() -> Iterator[KernelCase]:
    for n, slow in (
        (1, False),
        (2, False),
        (7, False),
        (33, False),
        (196, True),
        (576, False),
        (1000, True),
        (2880, True),
    ):
        for kind in KINDS:
            for k in sorted({0, 1, n // 2, n - n // 6 - 1, n, n + 3}):  # one falls among the NaN
                rare = (
                    slow
                    or (n > 33 and k not in (n // 2, n + 3))
                    or (n in (2, 7) and kind not in ("ties", "special"))
                )
                yield KernelCase(
                    "topk_select", f"{kind}-{n}-{k}", lambda a=(kind, 2, n), k=k: (scores(*a), k), slow=rare
                )
    for kind, k in (
        ("special", 700),
        ("ties", 4500),
        ("equal", 5000),
        ("bf16", 9000),
        ("normal", 0),
    ):
        name = f"long-{kind}-{k}"
        yield KernelCase(
            "topk_select", name, lambda a=(kind, 2, 9000), k=k: (scores(*a), k), slow=kind != "special"
        )
    wide = torch.randn(3, 50)
    yield KernelCase("topk_select", "a view", lambda: (wide[:, 5:45:2], 9))


# --- rows -----------------------------------------------------------------------------------------


def rows(batch: int, length: int, width: int) -> list[Tensor]:
    """Row tensors and side tensors: more than one launch takes, of many dtypes, one a view with an offset."""
    return [
        torch.randn(batch, length, width).bfloat16(),
        torch.randn(batch, length, 3, width),
        torch.arange(batch * length).view(batch, length),
        torch.rand(batch, length) < 0.5,
        torch.randn(batch, length + 3, width)[:, 3:].half(),
        torch.randn(batch, width, length).transpose(1, 2),
        torch.randn(batch, length, 2, dtype=torch.complex64),
    ]


# name: batch, N, k, width
PRUNED = {
    "few rows": (2, 33, 5, 8),
    "odd width": (2, 60, 13, 33),
    "k above N": (2, 10, 15, 16),
    "nothing kept": (2, 21, 0, 16),
    "no tokens": (2, 0, 3, 4),
    "many columns": (1, 12, 5, 520),
    "many rows": (1, 576, 64, 24),
    "long": (1, 8300, 30, 4),
}


def pruned_cases() -> Iterator[KernelCase]:
    for name, (batch, n, k, width) in PRUNED.items():

        def make(batch=batch, n=n, k=k, width=width):
            return scores("ties", batch, n), k, rows(batch, n, width)

        yield KernelCase("prune", name, make, slow=name in ("long", "many rows"))
        apart = name in ("long", "many rows", "few rows")
        yield KernelCase("prune", f"{name}-two", make, {"form": "two"}, slow=apart)


def gathered_cases() -> Iterator[KernelCase]:
    for batch, n, k, width in ((2, 33, 9, 16), (1, 12, 12, 700), (3, 20, 0, 5), (2, 5, 40, 3)):
        name = f"{batch}-{n}-{k}-{width}"

        def make(batch=batch, n=n, k=k, width=width):
            return rows(batch, n, width), torch.randint(0, n, (batch, k)).int()

        def back(batch=batch, n=n, k=k, width=width):
            idx = torch.rand(batch, n).argsort(-1)[:, :k].sort(-1).values.int()
            return torch.randn(batch, width, min(n, k)).transpose(1, 2), idx, n

        yield KernelCase("gather_rows", name, make)
        yield KernelCase("unprune", name, back)


# --- greedy choice --------------------------------------------------------------------------------


def grid_features(batch: int, n: int, width: int) -> Tensor:
    """(B, N, D) eighths, some rows equal: inner products are exact in any order, and ties are many."""
    features = torch.randint(-3, 4, (batch, n, width)).float() / 8
    features[:, n // 2] = features[:, 0]
    return features


def gram(features: Tensor) -> Tensor:
    return features @ features.transpose(1, 2)


def spoilt(sim: Tensor) -> Tensor:
    sim = sim.clone()
    n = sim.shape[1]
    sim[:, ::2, n // 3], sim[:, 0, n - 1], sim[:, n - 1, n // 4] = float("nan"), float("inf"), -float("inf")
    return sim


def weights(n: int, weighted: bool) -> Tensor | None:
    return torch.randint(0, 5, (2, n)).float() / 4 if weighted else None


def relevance(n: int) -> Tensor:
    return torch.randint(1, 9, (2, n)).float() / 8


def maxmin_cases() -> Iterator[KernelCase]:
    for n, k, slow in ((1, 1, False), (2, 5, False), (21, 7, False), (40, 40, True), (130, 20, True)):
        for first in ("nn", "argmax"):
            for weighted in (False, True):

                def by_matrix(n=n, k=k, first=first, weighted=weighted):
                    return gram(grid_features(2, n, 9)), k, weights(n, weighted), first

                def by_spoilt_matrix(n=n, first=first, weighted=weighted):  # all are picked: NaN come last
                    return spoilt(gram(grid_features(2, n, 9))), n, weights(n, weighted), first

                def by_features(n=n, k=k, first=first, weighted=weighted):
                    return grid_features(2, n, 9), k, weights(n, weighted), first

                name = f"{n}-{k}-{first}{'-weighted' * weighted}"
                rare = slow or (n == 2 and weighted)
                yield KernelCase("greedy_maxmin", name, by_matrix, slow=rare)
                yield KernelCase("greedy_maxmin", f"{name}-spoilt", by_spoilt_matrix, slow=rare or n != 21)
                yield KernelCase(
                    "greedy_maxmin_features", name, by_features, slow=rare or weighted == (first == "nn")
                )


def dpp_cases() -> Iterator[KernelCase]:
    near = {"tolerance": 1e-4}
    for n, k, slow in ((1, 1, False), (2, 5, False), (21, 7, False), (40, 40, True), (130, 20, True)):
        for op, change in (("greedy_dpp", gram), ("greedy_dpp_features", lambda features: features)):

            def make(n=n, k=k, change=change):
                return change(grid_features(2, n, 50)), relevance(n), k

            yield KernelCase(op, f"{n}-{k}", make, slow=slow, **near)
    # rank 3: afterwards nothing is left, and the lowest indices follow
    spent = torch.eye(8)[[0, 1, 2, 0, 1, 2, 2]][None] * 0.5
    yield KernelCase("greedy_dpp", "rank used up", lambda: (gram(spent), torch.ones(1, 7), 6))
    yield KernelCase("greedy_dpp_features", "rank used up", lambda: (spent, torch.ones(1, 7), 6))
    yield KernelCase(
        "greedy_dpp", "rank used up, rounded", lambda: (gram(torch.randn(2, 12, 3)), relevance(12), 6), **near
    )
    yield KernelCase(
        "greedy_dpp", "spoilt", lambda: (spoilt(gram(grid_features(2, 20, 40))), relevance(20), 4), **near
    )


# --- scores ---------------------------------------------------------------------------------------


def score_cases() -> Iterator[KernelCase]:
    for n, width in ((13, 40), (1, 1100)):
        yield KernelCase(
            "zoo_sensitivity",
            f"{n}-{width}",
            lambda n=n, w=width: (torch.rand(2, n, w), torch.rand(w, w)),
            tolerance=2e-5,
        )


CASES = [
    *selections(),
    *pruned_cases(),
    *gathered_cases(),
    *maxmin_cases(),
    *dpp_cases(),
    *score_cases(),
]
