# SPDX-License-Identifier: Apache-2.0
"""What the kernels gain on the CPU, one thread: selection with gathering, and greedy choices, against the
usual torch code.

    python kernels/cpu_bench.py                    # all cases, writes kernels/results/cpu.csv
    python kernels/cpu_bench.py --clock process    # CPU seconds, for a machine that does other things as well

All contestants of a case run in every round, in rotating order, on inputs that take turns; a round repeats
its calls for some milliseconds. Reported are the median, 20 and 80 percent quantiles and the best round; how
many times as long as ours a contestant takes, as the median over rounds and for the best rounds. Without
ties, all choose the same tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from itertools import chain, cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmprune.kernels import dispatch
from vlmprune.speed.conditions import processors
from vlmprune.speed.timing import CLOCKS

SETS = 8  # of inputs that take turns
LEAST = 2e-3  # seconds of a round
OURS = "vlmprune"


class Case(NamedTuple):
    name: str
    shape: str
    inputs: Callable[[int], tuple]  # of a seed
    contestants: dict[str, Callable[..., Any]]


# --- what others do -------------------------------------------------------------------------------


def usual_chain(scores: Tensor, x: Tensor, k: int) -> Tensor:
    """topk, sort, gather."""
    idx = scores.topk(k, dim=-1).indices.sort(dim=-1).values
    return x.gather(1, idx[..., None].expand(-1, -1, x.shape[-1]))


def fast_chain(scores: Tensor, x: Tensor, k: int) -> Tensor:
    """The same with the fastest gather of torch."""
    idx = scores.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    if len(x) == 1:
        return x[0].index_select(0, idx[0])[None]
    flat = idx + torch.arange(len(x))[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, flat.flatten()).view(*idx.shape, -1)


def published_maxmin(distance: Tensor, k: int) -> Tensor:
    """Farthest-point loop as DivPrune describes it: every step reduces the rows of all tokens that are chosen
    so far.

    The first token is the one with the largest second-smallest distance in its column, the smallest being
    that to itself.
    """
    chosen = torch.empty(k, dtype=torch.long)
    for step in range(k):
        if step == 0:
            nearest = distance.topk(2, dim=0, largest=False).values[1]
        else:
            rows = distance.index_select(0, chosen.index_select(0, torch.arange(step)))
            nearest = rows.min(dim=0).values
        chosen[step] = nearest.argmax()
    return chosen


def published_maxmin_features(x: Tensor, k: int) -> Tensor:
    return published_maxmin(1 - x @ x.T, k)


def published_dpp(kernel: Tensor, k: int) -> Tensor:
    """Fast greedy MAP of a DPP as it is usually written, one row of the Cholesky factor per step."""
    rows, residual = torch.zeros(k, len(kernel)), kernel.diagonal().clone()
    chosen = torch.empty(k, dtype=torch.long)
    for step in range(k):
        token = residual.argmax()
        chosen[step] = token
        row = (kernel[token] - torch.einsum("t,tn->n", rows[:step, token], rows[:step])) / torch.sqrt(
            residual[token]
        )
        rows[step] = row
        residual -= torch.square(row)
        residual[token] = -float("inf")
    return chosen


# --- cases ----------------------------------------------------------------------------------------


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit_rows(seed: int, n: int, width: int) -> Tensor:
    return torch.nn.functional.normalize(drawn(seed, n, width), dim=-1)


def prune_case(batch: int, n: int, k: int, width: int, dtype: torch.dtype) -> Case:
    return Case(
        "prune",
        f"B={batch} N={n} k={k} D={width} {str(dtype).removeprefix('torch.')}",
        lambda seed: (drawn(seed, batch, n).softmax(-1), drawn(seed + 1, batch, n, width).to(dtype), k),
        {
            OURS: lambda scores, x, k: dispatch.prune(scores, k, [x])[1][0],
            "topk+sort+gather": usual_chain,
            "topk+sort+index_select": fast_chain,
        },
    )


def maxmin_case(n: int, k: int) -> Case:
    def inputs(seed: int) -> tuple:
        sim = unit_rows(seed, n, 256) @ unit_rows(seed, n, 256).T
        return sim, 1 - sim, k

    return Case(
        "greedy_maxmin",
        f"N={n} k={k}, from the matrix",
        inputs,
        {
            OURS: lambda sim, distance, k: dispatch.greedy_maxmin(sim[None], k)[0][0],
            "published loop": lambda sim, distance, k: published_maxmin(distance, k),
        },
    )


def maxmin_features_case(n: int, k: int, width: int) -> Case:
    return Case(
        "greedy_maxmin_features",
        f"N={n} k={k} D={width}",
        lambda seed: (unit_rows(seed, n, width), k),
        {
            OURS: lambda x, k: dispatch.greedy_maxmin_features(x[None], k)[0][0],
            "published loop": published_maxmin_features,
        },
    )


def dpp_case(n: int, k: int) -> Case:
    def inputs(seed: int) -> tuple:
        sim, r = unit_rows(seed, n, 1024) @ unit_rows(seed, n, 1024).T, drawn(seed + 1, n).abs() + 0.5
        return sim, r, r[:, None] * sim * r, k

    return Case(
        "greedy_dpp",
        f"N={n} k={k}, from the matrix",
        inputs,
        {
            OURS: lambda sim, r, kernel, k: dispatch.greedy_dpp(sim[None], r[None], k)[0][0],
            "published loop": lambda sim, r, kernel, k: published_dpp(kernel, k),
        },
    )


# the two that are promised: at least 5 times as fast
PROMISED = [prune_case(1, 2880, 320, 4096, torch.bfloat16), maxmin_case(576, 64)]


def cases() -> list[Case]:
    return [
        prune_case(1, 576, 64, 1024, torch.bfloat16),
        prune_case(1, 576, 64, 4096, torch.bfloat16),
        prune_case(1, 576, 64, 4096, torch.float32),
        PROMISED[0],
        prune_case(1, 2880, 640, 4096, torch.bfloat16),
        prune_case(8, 576, 64, 4096, torch.bfloat16),
        PROMISED[1],
        maxmin_case(576, 192),
        maxmin_case(2880, 320),
        maxmin_features_case(576, 64, 4096),
        dpp_case(576, 64),
        dpp_case(576, 192),
    ]


# --- timing ---------------------------------------------------------------------------------------


def race(case: Case, rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds per call of every contestant, one number per round."""
    sets = [case.inputs(10 * seed) for seed in range(SETS)]
    names, turns = list(case.contestants), cycle(sets)  # nobody finds the rows of the call before in a cache
    calls = {name: _calls(case.contestants[name], turns, clock) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            run, count = case.contestants[name], calls[name]
            start = clock()
            for _ in range(count):
                run(*next(turns))
            taken[name].append((clock() - start) / count)
    return taken


def _calls(run: Callable[..., Any], turns: Iterator[tuple], clock: Callable[[], float]) -> int:
    """Calls that fill a round; warms up as well."""
    count = 1
    while True:
        start = clock()
        for _ in range(count):
            run(*next(turns))
        if clock() - start >= LEAST:
            return count
        count *= 2


def ratio(taken: dict[str, list[float]], name: str) -> float:
    """Median over rounds of how many times as long as ours a contestant takes."""
    return median(other / ours for other, ours in zip(taken[name], taken[OURS], strict=True))


def conditions(clock: str) -> dict[str, Any]:
    return {
        "cpu": next(iter(processors()), platform.machine()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "clock": clock,
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def measured(rounds: int, clock: str) -> Iterator[dict[str, Any]]:
    for case in cases():
        taken = race(case, rounds, CLOCKS[clock])
        for name, seconds in taken.items():
            low, *_, high = quantiles(seconds, n=5)
            yield {
                "op": case.name,
                "shape": case.shape,
                "contestant": name,
                "median_us": round(median(seconds) * 1e6, 1),
                "p20_us": round(low * 1e6, 1),
                "p80_us": round(high * 1e6, 1),
                "best_us": round(min(seconds) * 1e6, 1),
                "times_ours": round(ratio(taken, name), 2),
                "times_ours_best": round(min(seconds) / min(taken[OURS]), 2),
                "rounds": rounds,
                "peak_mib": "",
                **conditions(clock),
            }


def large_rows() -> Iterator[dict[str, Any]]:
    """Choices among 100,000 tokens, each in a process of its own: CPU seconds and peak memory."""
    for walk in ("argmax", "nn", "dpp"):
        command = [sys.executable, str(Path(__file__).with_name("cpu_memory.py")), walk]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        yield {
            "op": "greedy_dpp_features" if walk == "dpp" else f"greedy_maxmin_features, {walk}",
            "shape": found["shape"],
            "contestant": OURS,
            "median_us": round(found["seconds"] * 1e6),
            "rounds": 1,
            "peak_mib": found["peak_mib"],
            **conditions("process"),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.parent.mkdir(exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = None
        for row in chain.from_iterable((measured(options.rounds, options.clock), large_rows())):
            writer = writer or csv.DictWriter(file, row, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(*list(row.values())[:9], sep=" | ", flush=True)


if __name__ == "__main__":
    main()
