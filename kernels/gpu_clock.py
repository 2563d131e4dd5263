# SPDX-License-Identifier: Apache-2.0
"""Paired clocks for ``bench_gpu.py``: variants of a case take turns, over rotating inputs that together
exceed the L2 cache.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

DRY = "--dry-run" in sys.argv
ROUNDS = 1 if DRY else 30
Inputs = tuple


@dataclass
class Case:
    section: str
    name: str
    make: Callable[[], Inputs]  # fresh random inputs
    variants: dict[str, Callable]
    moved: int = 0  # bytes that any implementation must read and write
    graph: bool = True  # can be captured
    errors: dict[str, str] = field(default_factory=dict)


def captured(call: Callable, inputs: list[Inputs], copies: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for one in inputs[:2]:
            call(*one)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(*inputs[i % len(inputs)])
    return graph


def gpu_us(graph: torch.cuda.CUDAGraph, copies: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / copies


def host_and_wall_us(call: Callable, one: Inputs) -> tuple[float, float]:
    sync = (lambda: None) if DRY else torch.cuda.synchronize
    sync()
    start = time.perf_counter()
    call(*one)
    returned = time.perf_counter()
    sync()
    return (returned - start) * 1e6, (time.perf_counter() - start) * 1e6


def measure(case: Case) -> dict[str, dict[str, list[float]]]:
    one = case.make()
    held = sum(t.numel() * t.element_size() for t in flat(one)) or 1
    cache = 0 if DRY else torch.cuda.get_device_properties(0).L2_cache_size
    count = 1 if DRY else max(8, min(64, 2 * cache // held))
    inputs = [one, *(case.make() for _ in range(count - 1))]
    copies = 1 if DRY else max(2, min(50, 50 * 2**20 // held)) if case.graph else 1
    graphs, times = {}, {}
    for name, call in case.variants.items():
        try:
            call(*inputs[0])
            if case.graph and not DRY:
                graphs[name] = captured(call, inputs, copies)
            times[name] = {"gpu": [], "host": [], "wall": []}
        except Exception as error:  # a variant that this machine cannot run is a row that says so
            if name.startswith("ours"):
                raise
            case.errors[name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            )
    for turn in range(ROUNDS):
        for name in list(times)[:: 1 if turn % 2 else -1]:
            if name in graphs:
                times[name]["gpu"].append(gpu_us(graphs[name], copies))
            host, wall = host_and_wall_us(case.variants[name], inputs[turn % len(inputs)])
            times[name]["host"].append(host)
            times[name]["wall"].append(wall)
    return times


def flat(value) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from flat(item)


def rows(case: Case) -> Iterator[dict]:
    times = measure(case)
    for name in case.variants:
        row = {"section": case.section, "case": case.name, "variant": name, "bytes": case.moved or ""}
        row["note"] = case.errors.get(name, "")
        for clock in ("gpu", "host", "wall"):
            found = sorted(times.get(name, {}).get(clock, []))
            for percent in (50, 20, 80):
                row[f"{clock}_us_p{percent}"] = (
                    f"{found[percent * (len(found) - 1) // 100]:.2f}" if found else ""
                )
        yield row
