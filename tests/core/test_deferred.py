# SPDX-License-Identifier: Apache-2.0
"""Checks of values on a device: read late, all at once, and no wrong answer passes meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import vlmprune
from vlmprune.core.deferred import MANY, NOW, DeferredChecks, all_finite
from vlmprune.errors import InvariantError
from vlmprune.testing.device import PretendedDevice, moved, pretending
from vlmprune.testing.tiny import tiny_inputs, tiny_model

FINE, NONE = torch.tensor([0.0, -3.0]), torch.zeros(0)
BAD = [torch.tensor([1.0, float("nan")]), torch.tensor([float("inf"), 1.0]), torch.tensor([-float("inf")])]


@pytest.fixture
def device() -> Iterator[PretendedDevice]:
    made = PretendedDevice()
    with pretending(made):
        yield made


def away(device: PretendedDevice) -> tuple[Any, dict[str, Any]]:
    """A small model there, and a prompt with a picture."""
    inputs = tiny_inputs(images=(1,))
    return moved(tiny_model("llava"), device), {name: device.away(value) for name, value in inputs.items()}


def error(text: str = "wrong") -> InvariantError:
    return InvariantError(text)


@pytest.mark.parametrize("values", BAD)
def test_values_on_the_cpu_are_looked_at_at_once(values: torch.Tensor) -> None:
    for checks in (NOW, DeferredChecks()):
        checks.finite(FINE, error)
        checks.finite(NONE, error)
        with pytest.raises(InvariantError, match="wrong"):
            checks.finite(values, error)
        with pytest.raises(InvariantError, match="wrong"):
            checks.require(torch.tensor(False), error)
    assert bool(all_finite(FINE)) and bool(all_finite(NONE)) and not bool(all_finite(values))


@pytest.mark.parametrize("answers", [[], [True], [True, True]])
@pytest.mark.parametrize("count", [0, 1, 3, 6])
def test_where_all_is_well_nothing_changes_and_one_wait_reads_it(
    device: PretendedDevice, answers: list[bool], count: int
) -> None:
    checks, hidden = DeferredChecks(), torch.randn(2, 3)
    for number in range(count):
        checks.finite(device.away(FINE.bfloat16() if number % 2 else FINE), error)
    for one in answers:
        checks.require(device.away(torch.tensor([one])), error)
    assert torch.equal(checks.poison(device.away(hidden)).here, hidden) and device.counts.waits == 0
    checks.settle()
    assert device.counts.waits == min(1, count + len(answers)) and not checks


def test_many_magnitudes_take_two_launches_more_and_not_one_each(device: PretendedDevice) -> None:
    checks = DeferredChecks()
    for _ in range(6):
        checks.finite(device.away(FINE), error)
    device.take()
    checks.poison(device.away(torch.randn(2, 3)))
    assert device.counts.launches == 4  # joined, the largest, nothing or NaN, added


@pytest.mark.parametrize("bad", [*BAD, False])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_failed_check_spoils_everything_until_its_error_is_raised(
    device: PretendedDevice, bad: torch.Tensor | bool, before: int
) -> None:
    checks = DeferredChecks()
    for _ in range(before):
        checks.finite(device.away(FINE), error)
        checks.require(device.away(torch.tensor(True)), error)
    if isinstance(bad, torch.Tensor):
        checks.finite(device.away(bad), lambda: error("first"))
    else:
        checks.require(device.away(torch.tensor(bad)), lambda: error("first"))
    checks.require(device.away(torch.tensor(False)), lambda: error("second"))
    assert bool(checks.poison(device.away(torch.randn(2, 3))).here.isnan().all())
    with pytest.raises(InvariantError, match="first"):
        checks.settle()
    checks.settle()  # raised once


@torch.no_grad()
def test_a_loop_that_asks_for_nothing_waits_before_many_checks_are_due(device: PretendedDevice) -> None:
    model, given = away(device)
    with vlmprune.prune(model, "fastervlm@9") as run:
        due = []
        for _ in range(60):
            model(**given)
            due.append(len(run.local.checks.waiting))
    assert MANY < max(due) < MANY + 8


@torch.no_grad()
def test_an_error_of_a_forward_is_not_told_of_the_next_one(device: PretendedDevice) -> None:
    model, given = away(device)
    broken = {**given, "pixel_values": given["pixel_values"] * float("nan")}

    def full(*args: object) -> None:
        raise RuntimeError("out of memory")

    with vlmprune.prune(model, "fastervlm@9") as run:
        failing = model.model.language_model.layers[1].register_forward_pre_hook(full)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(**broken)
        failing.remove()
        model(**given)
        assert run.last.realised_tokens == [9]
