# SPDX-License-Identifier: Apache-2.0
"""The Ray engine on two nodes on this machine: the same journals, also when a worker dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from sweep_tools import comparable, journals, sweep

from vlmprune.errors import EvaluationError
from vlmprune.evaluation.leaderboard.engines import Ray
from vlmprune.evaluation.leaderboard.run import Settings, Silent, leaderboard

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray", reason="needs the extra [cluster]")


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    made.wait_for_nodes()
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    yield made.address
    ray.shutdown()
    made.shutdown()


def workers() -> dict[int, str]:
    """Process ids of Ray workers that are at work on a sweep; Ray writes the task's name into the title."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
        if title.startswith("ray::vlmprune"):
            found[int(path.parent.name)] = title
    return found


class Killer(Silent):
    """Kills a worker at work once the first answers are there."""

    killed: int | None = None

    def advance(self, answers: int) -> None:
        if self.killed is None and (found := workers()):
            self.killed = min(found)
            os.kill(self.killed, signal.SIGKILL)


def test_answers_are_those_of_one_process_though_a_worker_is_killed(small_model, cluster, tmp_path):
    from sweep_tools import config

    changes = {"limit": 40, "batch_size": 4}
    alone = sweep(small_model, tmp_path / "alone", **changes)
    killer, out = Killer(), tmp_path / "ray"
    results = leaderboard(config(small_model, **changes), out, Settings(engine=Ray(cluster)), killer)
    assert killer.killed is not None and killer.killed not in workers()
    assert journals(out) == journals(tmp_path / "alone") and comparable(results) == comparable(alone)


def test_a_run_begun_in_one_process_ends_on_the_cluster(small_model, cluster, finished):
    path = max((finished / "cells").glob("*.jsonl"))
    whole = journals(finished)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:5]))
    sweep(small_model, finished, Settings(engine=Ray(cluster)))
    assert journals(finished) == whole


def test_what_the_cluster_does_not_have_is_told(small_model, cluster, tmp_path):
    with pytest.raises(EvaluationError, match=r"a task needs \{'CPU': 64.*ask for less, or add a node"):
        sweep(small_model, tmp_path / "run", Settings(engine=Ray(cluster, cpus=64)))
