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

from vlmprune.kernels import reference

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


def stretched_cases() -> Iterator[KernelCase]:
    for n, slow in ((1, False), (13, False), (1500, True)):
        for kind in KINDS:

            def make(n=n, kind=kind):
                # the second row differs by rounding only
                rows = scores(kind, 2, n).float().abs()
                return torch.stack([rows[0], 1 + 1e-6 * rows[1].nan_to_num(posinf=1).clamp_max(9)]), 1e-4

            yield KernelCase("stretch", f"{kind}-{n}", make, tolerance=1e-6, slow=slow or kind == "normal")


def trended_cases() -> Iterator[KernelCase]:
    for n, slow in ((1, False), (2, False), (33, False), (1500, True)):
        for dtype in (torch.float32, torch.bfloat16):

            def make(n=n, dtype=dtype):
                a = torch.rand(3, n) * torch.exp(2 * torch.arange(n) / n)
                a[:, n // 3] = 0  # has no say
                a[2, n // 2] = -1  # becomes NaN
                return a.to(dtype), None if dtype == torch.float32 else torch.arange(n) % 4 > 0

            yield KernelCase("detrend", f"{n}-{dtype}", make, tolerance=1e-5, slow=slow)


# --- indices --------------------------------------------------------------------------------------


def index_cases() -> Iterator[KernelCase]:
    for n, k, slow in ((1, 1, False), (9, 9, False), (40, 5, False), (300, 140, True)):
        for wrong in (False, True):

            def order(n=n, k=k, wrong=wrong):
                idx = torch.rand(2, n).argsort(-1)[:, :k] - 1  # -1 among them
                if wrong:
                    idx[0, 0], idx[1, k // 2], idx[1, -1] = n, idx[1, 0], -3
                return idx, -1, n

            yield KernelCase("ordered_indices", f"{n}-{k}{'-wrong' * wrong}", order, slow=slow)

            def hosts(n=n, k=k, wrong=wrong):
                idx = torch.rand(2, n).argsort(-1)[:, :k]
                idx[:, : k // 3] = -1
                return (idx.int() if wrong else idx), n

            yield KernelCase("host_slots", f"{n}-{k}{'-int32' * wrong}", hosts, slow=slow)


# --- merging --------------------------------------------------------------------------------------

# name: batch, N, kept, rows in front, contextual, width of a key
MERGED = {
    "few": (2, 21, 5, 1, 3, 4),
    "nothing kept": (2, 9, 0, 0, 4, 8),
    "no targets": (2, 12, 3, 2, 0, 4),
    "all but targets kept": (1, 20, 12, 1, 8, 4),
    "many kept": (2, 150, 70, 3, 11, 70),
}


def groups_of(name: str, kind: str) -> tuple[Tensor, Tensor, int, int]:
    batch, n, kept, first, contextual, width = MERGED[name]
    keys = torch.randn(batch, n + 1, width)[:, 1:]  # a view with an offset
    if kind == "ties":  # lengths are powers of two, so that cosines are exact and many are equal
        keys = torch.eye(width)[torch.randint(width, (batch, n))] * 2.0 ** torch.randint(-3, 4, (batch, n, 1))
        keys[:, n // 2] = 0
    if kind == "bf16":
        keys = keys.bfloat16()
    idx = torch.rand(batch, n).argsort(-1)[:, :kept].sort(-1).values
    return keys, idx, first, contextual


def merged_cases() -> Iterator[KernelCase]:
    for name in MERGED:
        slow = name == "many kept"
        for kind in ("normal", "ties", "bf16"):
            yield KernelCase(
                "contextual_groups",
                f"{name}-{kind}",
                lambda a=(name, kind): groups_of(*a),
                slow=slow or kind == "bf16",
            )
        for combine in ("add", "mean"):
            for dtype, width in ((torch.float32, 5), (torch.bfloat16, 200)):

                def make(name=name, combine=combine, dtype=dtype, width=width):
                    keys, kept, first, contextual = groups_of(name, "normal")
                    slots, row = reference.contextual_groups(keys, kept, first, contextual)
                    x = torch.randint(-8, 9, (len(keys), keys.shape[1] + 2, width)).to(dtype)[:, 2:]
                    return x, slots, row, first + kept.shape[1], combine

                near = 1e-5 if dtype == torch.float32 else 1e-2
                title = f"{name}-{combine}-{width}"
                rare = slow or (combine == "mean") != (width == 5)
                if MERGED[name][4]:
                    yield KernelCase("contextual_rows", title, make, tolerance=near, slow=rare)


# --- crops ----------------------------------------------------------------------------------------


def members_of(sizes: list[int]) -> Tensor:
    """(C, M) tokens of crops of these sizes, in an order that is not theirs."""
    mixed, rows = torch.randperm(sum(sizes)), []
    for own in mixed.split(sizes):
        rows.append(torch.cat([own, torch.full((max(sizes) - len(own),), -1)]))
    return torch.stack(rows)


SIZES = {"one": [7], "ragged": [4, 1, 6, 3], "long": [70, 33, 20], "many": [3, 1, 2] * 15}


def crop_cases() -> Iterator[KernelCase]:
    for name, sizes in SIZES.items():
        slow = name in ("long", "many")
        for width, dtype in ((5, torch.float32), (40, torch.bfloat16)):

            def features(sizes=sizes, width=width, dtype=dtype):
                return torch.randn(2, sum(sizes) + 1, width).to(dtype)[:, 1:], members_of(sizes)

            title = f"{name}-{width}"
            yield KernelCase("crop_variance", title, features, tolerance=2e-4, slow=slow)
        for alpha in (1.0, 0.3, None):

            def attention(sizes=sizes, alpha=alpha):
                a, members = torch.rand(2, sum(sizes)), members_of(sizes)
                a[1, 0] = -0.1  # becomes NaN
                varied = None if alpha is None else torch.rand(2, *members.shape) * (members >= 0)
                return a, varied, members, alpha or 0.0

            yield KernelCase("crop_scores", f"{name}-{alpha}", attention, tolerance=1e-5, slow=slow)
        for rule in ("paper", "official"):
            for tau in (1.0, 0.0, 3.0):
                for share in (0.02, 0.3, 0.9, 1.0):

                    def mass(sizes=sizes, rule=rule, tau=tau, share=share):
                        given = torch.rand(4, len(sizes))
                        given[1] = torch.eye(len(sizes))[len(sizes) // 2]  # one has all, and more than room
                        given[2], given[3, 0] = 0, torch.nan
                        return given, members_of(sizes), max(1, int(share * sum(sizes))), tau, rule

                    rare = slow or (tau, share) not in ((1.0, 0.3), (1.0, 0.9), (0.0, 0.9))
                    yield KernelCase("share_out", f"{name}-{rule}-{tau}-{share}", mass, slow=rare)
        for kind in ("normal", "ties", "special"):
            for k in (1, sum(sizes) // 2, sum(sizes)):

                def ranked(sizes=sizes, kind=kind, k=k):
                    members = members_of(sizes)
                    rank = scores(kind, 2 * len(sizes), members.shape[1]).view(2, *members.shape)
                    quota = torch.randint(0, members.shape[1] + 2, (2, len(sizes)))
                    return rank.nan_to_num(0.5), members, quota, k

                yield KernelCase(
                    "top_k_in_groups", f"{name}-{kind}-{k}", ranked, slow=slow or k != sum(sizes) // 2
                )


CASES = [
    *selections(),
    *pruned_cases(),
    *gathered_cases(),
    *maxmin_cases(),
    *dpp_cases(),
    *score_cases(),
    *stretched_cases(),
    *trended_cases(),
    *index_cases(),
    *merged_cases(),
    *crop_cases(),
]
