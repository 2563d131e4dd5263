# SPDX-License-Identifier: Apache-2.0
"""Timing in rounds: every candidate once per round, in rotating order, so that slow minutes hit all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# what is entered around the call and not timed, and the call
Entry = tuple[AbstractContextManager[Any] | None, Callable[[], Any]]
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def race(
    entries: Mapping[str, Entry],
    rounds: int,
    *,
    warmup: int = 2,
    clock: str = "wall",
    on_round: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every entry in every round; the first ``warmup`` rounds are not counted.

    Args:
        clock: "wall", or "process": CPU seconds, for a busy machine.
        on_round: called after each round, those of the warm-up too.
    """
    now = CLOCKS[clock]
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    names = list(entries)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(warmup + rounds):
        # now, since none runs until the round is over
        gc.collect()
        # a collection in the middle of a call would be timed with it
        gc.disable()
        try:
            # another one begins each round, so that none is always the first after the pause
            for name in names[number % len(names) :] + names[: number % len(names)]:
                attached, call = entries[name]
                with nullcontext() if attached is None else attached:
                    # what was launched by attaching is not timed
                    sync()
                    started = now()
                    call()
                    # kernels run behind the host: the call ends when they do
                    sync()
                    taken = now() - started
                if number >= warmup:
                    seconds[name].append(taken)
        finally:
            gc.enable()
        if on_round is not None:
            on_round()
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round: what disturbs a whole round cancels."""
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float]) -> list[float]:
    """20th and 80th percentile."""
    return (
        torch.tensor(values, dtype=torch.float64)
        .quantile(torch.tensor([0.2, 0.8], dtype=torch.float64))
        .tolist()
    )
