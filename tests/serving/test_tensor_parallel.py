# SPDX-License-Identifier: Apache-2.0
"""Two ranks that share the heads of tower and language model: answers are still those of transformers.

Each rank is a process of its own on the CPU.
"""

from __future__ import annotations

import random
import sys

import pytest
import served_engine
from served import NEW
from served_engine import Job, wrong

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
# read of attention heads, which are shared out; of the projector, whose weights are; of features alone
SPECS = (
    "dense",
    "fastervlm@36",
    "fastervlm(cls=mean)@36",
    "vispruner@36",
    "visionzip@36",
    "zooprune@36",
    "divprune@36",
    "uniform@36",
)


@pytest.fixture(scope="module")
def engine():
    from vlmprune.models.tiny import FOLDER

    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    steps = {"max_num_batched_tokens": 512, "long_prefill_token_threshold": 64}
    with served_engine.engine(FOLDER, "dense", **ranks, **steps) as made:
        yield made


def jobs_of(twin, pairs) -> list[Job]:
    return [(prompt.request(spec), twin.answer(prompt, spec)) for prompt, spec in pairs]


def share_of_heads(worker) -> tuple[int, int, bool]:
    """(heads of the tower here, heads of it in all, whether they are gathered), said by a rank."""
    from vlmprune.hooks.vision.tower import attention_of, find_blocks

    watched = worker.get_model().watched
    attention = attention_of(find_blocks(watched.tower)[0])
    return attention.num_heads_per_partition, attention.num_heads, watched.gather is not None


def keep_heads_apart(worker) -> None:
    """The mutant: every rank ranks the patches by its own heads."""
    worker.get_model().watched.gather = None


def on_all_ranks(engine, function) -> list:
    import cloudpickle

    # ranks cannot import the files of tests
    module = sys.modules[function.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        return engine.collective_rpc(function)
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_answers_on_two_ranks_are_those_of_transformers(engine, twin):
    """Every spec with the same ten prompts, two of them with two pictures."""
    assert on_all_ranks(engine, share_of_heads) == [(2, 4, True)] * 2
    prompts = twin.prompts(1)
    assert [len(prompt.images) for prompt in prompts] == [1] * 8 + [2] * 2
    pairs = [(prompt, spec) for prompt in prompts for spec in SPECS]
    random.Random(0).shuffle(pairs)
    assert wrong(engine, jobs_of(twin, pairs), NEW) == []


# last: the engine is broken behind it
def test_heads_that_are_not_gathered_change_answers(engine, twin):
    on_all_ranks(engine, keep_heads_apart)
    # another budget than before: nothing of it is cached
    pairs = [(prompt, spec) for prompt in twin.prompts(2) for spec in ("fastervlm@12", "visionzip@12")]
    assert wrong(engine, jobs_of(twin, pairs), NEW) != []
