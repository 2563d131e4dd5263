# SPDX-License-Identifier: Apache-2.0
"""The model "natural" inside vLLM, with the files that ``vlmprune serve natural`` gives it, and no caches."""

from __future__ import annotations

import pytest
from served import NEW, Twin
from served_engine import engine, ids_of, outputs_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SPECS = ("dense", "fastervlm@36", "visionzip@18", "divprune@9", "zooprune@36")


def test_the_model_natural_answers_as_in_transformers():
    from vlmprune.evaluation.tasks.scenes import scenes
    from vlmprune.evaluation.tasks.scenes.example import example
    from vlmprune.models.tiny import BUNDLED

    twin = Twin("natural")
    asked = [example(family, number) for family in scenes().families for number in range(3)]
    prompts = [twin.prompt([one.picture], one.question) for one in asked]
    jobs = [(prompt, spec) for prompt in prompts for spec in SPECS]
    without = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    with engine(BUNDLED["natural"], "dense", max_model_len=512, **without) as made:
        outputs = outputs_of(made, [prompt.request(spec) for prompt, spec in jobs], NEW, None)
    assert ids_of(outputs) == [twin.answer(prompt, spec) for prompt, spec in jobs]
    assert not any(one.num_cached_tokens for one in outputs)
    lengths = [len(one.prompt_token_ids) for one in outputs[: len(SPECS)]]
    assert [lengths[0] - length for length in lengths] == [0, 108, 126, 135, 108]
