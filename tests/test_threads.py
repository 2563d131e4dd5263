# SPDX-License-Identifier: Apache-2.0
"""The recipes of docs/threads.md: eight threads and one model, with one spec for all or with a spec for each
request.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vlmprune

PAGE = Path(__file__).parents[1] / "docs" / "threads.md"
SHARED, OWN = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
KINDS = [(family, number) for family in ("text", "exist", "attribute", "count") for number in range(2)]


def run(block, names):
    exec(compile(block, str(PAGE), "exec"), names)


@pytest.fixture(scope="module")
def recipe():
    """Names of the page's first block, and inputs of eight questions; nothing is attached."""
    names = {"__name__": "threads"}
    run(SHARED, names)
    names["run"].detach()
    prompts = [
        vlmprune.encode(names["model"], names["processor"], *vlmprune.example(*kind)[:2]) for kind in KINDS
    ]
    return names, prompts


def together(function, jobs):
    """Answers of eight threads, in the order of the jobs."""
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda job: function(*job), jobs))


def test_one_spec_serves_all_threads(recipe):
    names, prompts = recipe
    with vlmprune.prune(names["model"], "fastervlm@16"):
        alone = [names["answer"](inputs) for inputs in prompts]
        assert together(names["answer"], [(inputs,) for inputs in prompts * 2]) == alone * 2


def test_every_request_has_its_own_spec(recipe):
    names, prompts = recipe
    jobs = [(inputs, spec) for inputs in prompts for spec in ("fastervlm@16", "uniform@9", "dense")]
    alone = []
    for inputs, spec in jobs:
        with vlmprune.prune(names["model"], spec):
            alone.append((names["answer"](inputs), {"fastervlm@16": 16, "uniform@9": 9, "dense": 144}[spec]))
    names["run"] = vlmprune.attach(names["model"], "fastervlm@36")  # as the first block left it
    run(OWN, names)
    assert together(names["answer_with"], jobs) == alone
    assert len({said for said, _ in alone}) > 4, "the answers are too much alike to tell a mixed-up one"


def test_without_the_lock_a_second_spec_is_refused(recipe):
    names, _ = recipe
    with (
        vlmprune.prune(names["model"], "fastervlm@16"),
        pytest.raises(vlmprune.VlmPruneError, match="has 'fastervlm@16' attached already; detach it first"),
    ):
        vlmprune.attach(names["model"], "uniform@9")
