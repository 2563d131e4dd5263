# SPDX-License-Identifier: Apache-2.0
"""Choosing works with torch's threads alone: NumPy's BLAS has a pool of its own, which spins beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(not TASKS.exists(), reason="threads are listed in /proc, which is not here")

# the pool of NumPy's BLAS is there from its import on: its threads are those that come with NumPy. They sleep
# until a product wakes them, so that how often each was scheduled tells whether there was one.
SETTING = """
import time
from pathlib import Path

def scheduled():
    found = {}
    for task in Path("/proc/self/task").iterdir():
        found[task.name] = int((task / "schedstat").read_text().split()[2])
    return found

alone = set(scheduled())
import numpy as np
of_numpy = set(scheduled()) - alone
if not of_numpy:
    print("no pool")
    raise SystemExit

import torch
from vlmprune.kernels import cpu_greedy, dispatch

torch.set_num_threads(3)
x = torch.nn.functional.normalize(torch.randn(1, 600, 512), dim=-1)
r = torch.rand(1, 600)

def choose():
    dispatch.greedy_maxmin_features(x, 64)
    dispatch.greedy_dpp_features(x, r, 64)
    dispatch.topk_select(r, 64)
    cpu_greedy.GRAM = 0
    dispatch.greedy_maxmin_features(x, 64)
    dispatch.greedy_dpp_features(x, r, 64)
    cpu_greedy.GRAM = 4096

choose()  # torch starts its own threads
before, deadline = scheduled(), time.monotonic() + 60
while time.monotonic() < deadline:  # until those of NumPy sleep
    time.sleep(0.3)
    now = scheduled()
    if all(now[task] == before[task] for task in of_numpy):
        break
    before = now
else:
    print("no sleep")
    raise SystemExit

{change}
before = scheduled()
choose()
after = scheduled()
print(len(set(after) - set(before)), sum(after[task] - before[task] for task in of_numpy))
"""
BY_NUMPY = "cpu_greedy._products = lambda rows, others: rows.numpy() @ others.numpy()"


def threads_of(change: str) -> tuple[int, int]:
    """New threads while choosing, and how often those of NumPy ran."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in names} | {"PYTHONSAFEPATH": "1"}
    code = SETTING.replace("{change}", change)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    if done.stdout.startswith("no "):
        pytest.skip(f"NumPy's BLAS: {done.stdout.strip()}")
    new, woken = done.stdout.split()
    return int(new), int(woken)


def test_choosing_wakes_no_second_pool() -> None:
    assert threads_of("") == (0, 0)


def test_a_product_of_numpy_would_be_seen() -> None:
    assert threads_of(BY_NUMPY)[1] > 0
