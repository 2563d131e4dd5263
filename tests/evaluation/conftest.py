# SPDX-License-Identifier: Apache-2.0
"""Run folders of a simulation, made once, and a browser where one is installed."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from headless import browser  # noqa: F401 (a fixture)

sys.path.append(str(Path(__file__).parent))
from simulated_run import simulate
from sweep_tools import sweep

from vlmprune.testing.tiny import tiny_bundle


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """Two models, two budgets; never written to."""
    return simulate(
        tmp_path_factory.mktemp("runs") / "run",
        samples=80,
        budgets=(36, 9),
        models=("model-a", "model-b"),
        resamples=200,
    )


@pytest.fixture
def broken_run(tmp_path, run_folder):
    """A copy that a test may break."""
    return Path(shutil.copytree(run_folder, tmp_path / "run"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A random model of 36 tokens per picture, as a folder."""
    folder = tmp_path_factory.mktemp("models") / "small"
    model, processor = tiny_bundle("llava")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _finished(small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "run"
    sweep(small_model, folder)
    return folder


@pytest.fixture
def finished(tmp_path, _finished):
    """A copy of a finished sweep that a test may change."""
    return Path(shutil.copytree(_finished, tmp_path / "finished"))
