# SPDX-License-Identifier: Apache-2.0
"""Families that vLLM runs in its wrapper of transformers: answers are those of vlmprune.prune.

The wrapper decorates classes of transformers, so that no model of them can run by itself in this process any
more: what transformers answers is computed before the engine starts.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
from served_tiny import FAMILIES, NEW, SHAPES, TinyTwin, save

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
Job = tuple[dict, list[int]]  # request, answer of transformers
REFUSED = {
    "aya_vision": ("fastervlm@9", "cls=mean"),
    "vipllava": ("zooprune@9", "projector, which cannot be read here"),
}


@dataclass
class Served:
    """A family in an engine."""

    family: str
    engine: Any
    never: dict[int, float]
    jobs: list[Job]
    after_a_refusal: list[Job]
    with_a_fault: list[Job]

    def outputs(self, requests: list[dict]) -> list[Any]:
        import vllm

        greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logit_bias=self.never)
        return self.engine.generate(requests, greedy, use_tqdm=False)

    def wrong(self, jobs: list[Job]) -> list[tuple]:
        outputs = self.outputs([request for request, _ in jobs])
        return [
            (request["mm_processor_kwargs"], given, wanted)
            for (request, wanted), output in zip(jobs, outputs, strict=True)
            if (given := list(output.outputs[0].token_ids)) != wanted
        ]


@pytest.fixture(scope="module", params=[name for name, one in FAMILIES.items() if one.wrapped])
def served(request, tmp_path_factory):
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    from vlmprune.serving import overrides

    family = request.param
    folder = tmp_path_factory.mktemp(family)
    save(family, folder)
    twin = TinyTwin(family, folder)
    jobs = twin.jobs(FAMILIES[family].specs, len(SHAPES))
    after, fault = twin.jobs(("divprune@11",), 1, seed=3), twin.jobs(("uniform@13",), 1, seed=5)
    made = vllm.LLM(
        str(folder),
        hf_overrides=overrides("divprune@9"),
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_model_len=1024,
        max_num_batched_tokens=512,
        long_prefill_token_threshold=24,
        max_num_seqs=8,
        block_size=32,
        limit_mm_per_prompt={"image": 2},
        enable_prefix_caching=True,
    )
    yield Served(family, made, twin.never, jobs, after, fault)
    made.llm_engine.engine_core.shutdown()
    del made
    gc.collect()
    cleanup_dist_env_and_memory()


def test_answers_are_those_of_transformers(served):
    """Every spec with every shape of prompts, then again from the caches."""
    assert served.wrong(served.jobs) == []
    again = served.outputs([request for request, _ in served.jobs])
    assert max(output.num_cached_tokens for output in again) >= 32
    assert [list(output.outputs[0].token_ids) for output in again] == [wanted for _, wanted in served.jobs]
    # the model is random: if what stays did not matter to its answers, they would prove nothing
    assert len({tuple(wanted) for _, wanted in served.jobs}) > len(served.jobs) // 3


def test_what_the_family_cannot_do_is_refused_and_the_engine_lives(served):
    from vllm.exceptions import VLLMValidationError

    spec, why = REFUSED[served.family]
    ((request, _),) = served.after_a_refusal
    with pytest.raises(VLLMValidationError, match=why):
        served.outputs([{**request, "mm_processor_kwargs": {"vlmprune": spec}}])
    assert served.wrong(served.after_a_refusal) == []


def test_attention_that_fails_its_check_falls_back_and_is_counted(served, monkeypatch):
    """Nothing may be raised in the engine: the pictures are cut by ``uniform``, to the same count."""
    from vlmprune.hooks.attention_call import AttentionCall
    from vlmprune.serving.tally import TALLY

    attend = AttentionCall.attention
    monkeypatch.setattr(AttentionCall, "attention", lambda call, *args: 0.5 * attend(call, *args))
    ((request, wanted),) = served.with_a_fault
    spec = "fastervlm(cls=mean)@13"
    job = {**request, "mm_processor_kwargs": {"vlmprune": spec}}
    assert served.wrong([(job, wanted)]) == []
    counts = TALLY.by_spec[spec]
    assert 0 < counts.pictures == counts.fallbacks
