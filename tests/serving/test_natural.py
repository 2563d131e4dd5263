# SPDX-License-Identifier: Apache-2.0
"""The model "natural" inside vLLM, with the files that ``vlmprune serve natural`` gives it."""

from __future__ import annotations

import pytest
from served import NEW, Twin

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
SPECS = ("dense", "fastervlm@36", "visionzip@18", "divprune@9", "zooprune@36")


def test_the_model_natural_answers_as_in_transformers():
    import vllm

    from vlmprune.evaluation.tasks.scenes import scenes
    from vlmprune.evaluation.tasks.scenes.example import example
    from vlmprune.models.tiny import BUNDLED
    from vlmprune.serving import overrides

    twin = Twin("natural")
    asked = [example(family, number) for family in scenes().families for number in range(3)]
    prompts = [twin.prompt([one.picture], one.question) for one in asked]
    engine = vllm.LLM(
        str(BUNDLED["natural"]),
        hf_overrides=overrides("dense"),
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_model_len=512,
        max_num_seqs=8,
        block_size=32,
    )
    greedy = vllm.SamplingParams(temperature=0, max_tokens=NEW)
    jobs = [(prompt, spec) for prompt in prompts for spec in SPECS]
    outputs = engine.generate([prompt.request(spec) for prompt, spec in jobs], greedy, use_tqdm=False)
    given = [list(one.outputs[0].token_ids) for one in outputs]
    assert given == [twin.answer(prompt, spec) for prompt, spec in jobs]
    lengths = [len(one.prompt_token_ids) for one in outputs[: len(SPECS)]]
    assert [lengths[0] - length for length in lengths] == [0, 108, 126, 135, 108]
