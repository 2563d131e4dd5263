# SPDX-License-Identifier: Apache-2.0
"""The launch table, as calls: every block, number of warps, form and kind of row that the launchers can
choose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vlmprune.kernels import triton as ops


@dataclass(frozen=True)
class Case:
    """One call of a launcher. Memory of large inputs is never touched."""

    name: str
    call: Callable[[], object]
    quick: bool = False  # of the subset for every run
    vector: bool = True  # its copies must be 16 bytes wide


empty, half, ints = torch.empty, torch.bfloat16, torch.int32


def prune(
    batch: int, n: int, width: int, dtype: torch.dtype = half, sides: bool = False, form: str = "auto"
) -> Callable:
    xs = [empty(batch, n, width, dtype=dtype)]
    if sides:  # hidden states of two layers, positions, a mask
        xs += [
            empty(batch, n, width, dtype=dtype),
            empty(batch, n, dtype=torch.int64),
            empty(batch, n, dtype=torch.bool),
        ]
    return lambda: ops.prune(empty(batch, n), 64, xs, form)


def maxmin(n: int, weighted: bool = False, first: str = "nn") -> Callable:
    return lambda: ops.greedy_maxmin(empty(1, n, n), 8, empty(1, n) if weighted else None, first)


def maxmin_steps(n: int, width: int) -> Callable:
    return lambda: ops.greedy_maxmin_features(empty(1, n, width), 1, None, "argmax")


def half_rows(n: int, width: int) -> torch.Tensor:
    return empty(1, n, width, dtype=half)


def contextual_groups(n: int, k: int, width: int) -> Callable:
    kept = empty(1, k, dtype=torch.int64)
    return lambda: ops.contextual_groups(half_rows(n, width), kept, 1, max(1, k // 5))


def contextual_rows(dtype: torch.dtype) -> Callable:
    slots, row = empty(1, 64, dtype=torch.int64), empty(1, 576, dtype=torch.int64)
    return lambda: ops.contextual_rows(empty(1, 576, 1024, dtype=dtype), slots, row, 54, "add")


def crops(count: int, size: int) -> torch.Tensor:
    return empty(count, size, dtype=torch.int64)


def crop_scores(varied: bool) -> Callable:
    variance = empty(1, 16, 36) if varied else None
    return lambda: ops.crop_scores(empty(1, 576), variance, crops(16, 36), 1.0)


def share_out(count: int, rule: str) -> Callable:
    return lambda: ops.share_out(empty(1, count), crops(count, 36), 64, 1.0, rule)


CASES = [
    *(
        Case(f"select N={n}", lambda n=n: ops.topk_select(empty(1, n), 64), n in (576, 2880))
        for n in (100, 196, 576, 1000, 2000, 2880, 8192)
    ),
    Case("select N=100000", lambda: ops.topk_select(empty(1, 100_000), 64), True),
    *(
        Case(f"prune B={b} N={n} D={d}", prune(b, n, d), (b, n) == (1, 576))
        for b, n, d in (
            (1, 576, 1024),
            (1, 576, 4096),
            (16, 576, 4096),
            (64, 576, 4096),
            (1, 2880, 4096),
            (16, 2880, 4096),
            (32, 2880, 4096),
            (64, 2880, 4096),
            (1, 4096, 3584),
            (1, 8192, 3584),
            (1, 100_000, 3584),
        )
    ),
    Case("prune N=576 D=4096 fp32", prune(1, 576, 4096, torch.float32)),
    Case("prune N=576 D=4096 fp8", prune(1, 576, 4096, torch.float8_e4m3fn)),
    Case("prune N=576 two rows, two sides", prune(1, 576, 4096, half, True), True),
    Case("prune N=8192 two rows, two sides", prune(1, 8192, 4096, half, True)),
    Case("prune apart N=576 two rows, two sides", prune(1, 576, 4096, half, True, "two")),
    Case("prune N=576 D=1000, not aligned", prune(1, 576, 1000), vector=False),
    Case(
        "gather N=576 D=4096",
        lambda: ops.gather_rows([empty(1, 576, 4096, dtype=half)], empty(1, 64, dtype=ints)),
        True,
    ),
    Case(
        "unprune N=576 D=4096",
        lambda: ops.unprune(empty(1, 64, 4096, dtype=half), empty(1, 64, dtype=ints), 576),
        True,
    ),
    *(Case(f"maxmin N={n}", maxmin(n), n == 576) for n in (196, 576, 2000, 2880, 8192)),
    Case("maxmin N=576 weighted", maxmin(576, True, "argmax")),
    Case("maxmin N=9000, by steps", lambda: ops.greedy_maxmin(empty(1, 9000, 9000), 1, None, "argmax")),
    *(
        Case(f"maxmin by features N={n} D={d}", maxmin_steps(n, d), n == 100_000)
        for n, d in ((576, 4096), (2880, 4096), (100_000, 256), (300_000, 256))
    ),
    *(
        Case(f"dpp N={n} k={k}", lambda n=n, k=k: ops.greedy_dpp(empty(1, n, n), empty(1, n), k), n == 576)
        for n, k in (
            (196, 64),
            (576, 64),
            (2000, 24),
            (4096, 12),
        )
    ),
    Case("dpp N=2880, by steps", lambda: ops.greedy_dpp(empty(1, 2880, 2880), empty(1, 2880), 20)),
    *(
        Case(
            f"dpp by features N={n} D={d}",
            lambda n=n, d=d: ops.greedy_dpp_features(empty(1, n, d), empty(1, n), 1),
            n == 100_000,
        )
        for n, d in (
            (576, 4096),
            (100_000, 256),
        )
    ),
    Case(
        "sensitivity H=4096",
        lambda: ops.zoo_sensitivity(empty(1, 64, 4096, dtype=half), empty(4096, 4096, dtype=half)),
        True,
    ),
    Case("ordered indices K=640", lambda: ops.ordered_indices(crops(1, 640), 0, 2880), True),
    Case("host slots K=64 N=576", lambda: ops.host_slots(crops(1, 64), 576), True),
    Case("stretch N=2880", lambda: ops.stretch(empty(1, 2880), 1e-4), True),
    Case("detrend N=2880", lambda: ops.detrend(empty(1, 2880)), True),
    Case("detrend N=576, padded", lambda: ops.detrend(empty(1, 576), empty(576, dtype=torch.bool))),
    *(
        Case(f"contextual groups N={n} k={k}", contextual_groups(n, k, 64), n == 576)
        for n, k in ((576, 54), (2880, 270))
    ),
    *(
        Case(f"contextual rows {dtype}", contextual_rows(dtype), dtype == half)
        for dtype in (half, torch.float32)
    ),
    *(
        Case(
            f"crop variance M={m} D={d}",
            lambda c=c, m=m, d=d: ops.crop_variance(half_rows(c * m, d), crops(c, m)),
            m == 36,
        )
        for c, m, d in ((16, 36, 4096), (1, 576, 4096), (5, 576, 3584))
    ),
    *(
        Case(f"crop scores{' and variance' * varied}", crop_scores(varied), varied)
        for varied in (False, True)
    ),
    *(
        Case(f"share out C={c}, {rule}", share_out(c, rule), (c, rule) == (16, "paper"))
        for c in (16, 576, 1024)
        for rule in ("paper", "official")
    ),
    *(
        Case(
            f"best of crops M={m}",
            lambda c=c, m=m: ops.top_k_in_groups(
                empty(1, c, m), crops(c, m), empty(1, c, dtype=torch.int64), 64
            ),
            m == 36,
        )
        for c, m in ((16, 36), (1, 2880))
    ),
]
