# SPDX-License-Identifier: Apache-2.0
"""Kernels are tested three ways, each in a process of its own, since Triton decides at its import whether it
interprets:

TRITON_INTERPRET=1 pytest tests/kernels -m "interpret and not slow"
pytest tests/kernels -m "compile_gate and not slow"
pytest tests/kernels -m gpu                                             # where there is a GPU
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch


def reason_to_skip(item) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    markers = {mark.name for mark in item.iter_markers()}
    if markers & {"interpret", "compile_gate", "gpu"} and find_spec("triton") is None:
        return "needs Triton"
    if "interpret" in markers and not interpreted:
        return "needs TRITON_INTERPRET=1 in the environment"
    if "compile_gate" in markers and (interpreted or "compile_gate" not in item.config.option.markexpr):
        return "a run of its own: -m compile_gate, without TRITON_INTERPRET"
    if "gpu" in markers and (interpreted or not torch.cuda.is_available()):
        return "needs a CUDA device, and no TRITON_INTERPRET"
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if reason := reason_to_skip(item):  # a process decides at its start for one of the three ways
            item.add_marker(pytest.mark.skip(reason=reason))


GUARD, POISON = 2**16, 0x7B


@pytest.fixture
def poisoned(monkeypatch):
    """Every tensor that ``torch.empty`` returns is full of poison and lies between guards: (memory, bytes in
    the middle).
    """
    made, empty = [], torch.empty

    def guarded_empty(*size, dtype=None, device=None):
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = dtype or torch.float32
        count = torch.Size(shape).numel() * dtype.itemsize
        room = empty(GUARD + -(-count // 16) * 16 + GUARD, dtype=torch.uint8, device=device).fill_(POISON)
        made.append((room, count))
        return room[GUARD : GUARD + count].view(dtype).view(shape)

    monkeypatch.setattr(torch, "empty", guarded_empty)
    return made


@pytest.fixture
def guarded(poisoned):
    """``poisoned``, and nobody may write to the guards."""
    yield
    assert poisoned
    for room, count in poisoned:
        assert bool((room[:GUARD] == POISON).all()) and bool((room[GUARD + count :] == POISON).all())
