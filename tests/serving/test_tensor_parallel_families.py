# SPDX-License-Identifier: Apache-2.0
"""Small models of other families on two ranks: answers are still those of transformers."""

from __future__ import annotations

import pytest
import served_engine
from served_engine import wrong
from served_tiny import FAMILIES, NEW, TinyTwin, save

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_answers_on_two_ranks_are_those_of_transformers(family, tmp_path):
    """Every spec with two shapes of prompts; steps cut through pictures."""
    save(family, tmp_path)
    twin = TinyTwin(family, tmp_path)
    jobs = twin.jobs(FAMILIES[family].specs, 2)
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    steps = {"max_num_batched_tokens": 512, "long_prefill_token_threshold": 24}
    with served_engine.engine(tmp_path, "divprune@9", **ranks, **steps) as engine:
        assert wrong(engine, jobs, NEW, twin.never) == []
