# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark runs, as far as that can be seen without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "kernels"
RESULTS = FOLDER / "results"


def run(*options):
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, FOLDER / "bench_gpu.py", *options], capture_output=True, text=True, env=env
    )


def test_without_triton_it_says_so_in_one_line():
    code = (
        "import runpy, sys; sys.modules['triton'] = None; sys.argv[0] = sys.argv[1]; "
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, FOLDER / "bench_gpu.py", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: Triton is not installed") and done.stderr.count("\n") == 1


def written():
    return {path: path.stat().st_mtime_ns for path in RESULTS.glob("*")}


@pytest.mark.slow
@pytest.mark.interpret
def test_a_dry_run_tries_everything_and_writes_nothing():
    before = written()
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("rows, not written") and written() == before
    assert len(lines) > 90 and all("DRY RUN, not a measurement" in line for line in lines[:-1])
    # what could not run says why; nothing but FlashInfer is missing here
    failed = [line for line in lines[:-1] if line.partition("not a measurement")[2].strip()]
    assert all("flashinfer" in line for line in failed)


@pytest.mark.interpret
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_nothing_is_measured():
    done = run()
    assert done.returncode == 2 and "no CUDA device" in done.stderr
