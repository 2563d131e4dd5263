# SPDX-License-Identifier: Apache-2.0
"""Inside vLLM: answers are those of vlmprune.prune with transformers, whatever shares the engine."""

from __future__ import annotations

import random

import pytest
import served_engine
from served import NEW, Prompt
from served_engine import outputs_of, wrong

SPECS = [
    "dense",
    "fastervlm@36",
    "fastervlm@0.11",
    "fastervlm(cls=mean)@36",
    "divprune@36",
    "visionzip@36",
    "zooprune@36",
    "holov@36",
    "uniform@36",
    "pool@36",
    "vispruner@36",
]
pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine():
    """Steps of 20 tokens cut through pictures."""
    from vlmprune.models.tiny import FOLDER

    steps = {"max_num_batched_tokens": 160, "long_prefill_token_threshold": 20}
    with served_engine.engine(FOLDER, "fastervlm@36", enable_prefix_caching=True, **steps) as made:
        yield made


def answers(engine, requests):
    return outputs_of(engine, requests, NEW, None)


def differing(engine, twin, jobs: list[tuple[Prompt, str]]) -> list[tuple]:
    """Specs whose answers are not those of transformers, one entry per job, all in one shuffled batch."""
    return wrong(engine, [(prompt.request(spec), twin.answer(prompt, spec)) for prompt, spec in jobs], NEW)


def shuffled(prompts, specs):
    jobs = [(prompt, spec) for prompt in prompts for spec in specs]
    random.Random(0).shuffle(jobs)
    return jobs


def test_mixed_specs_in_one_engine_answer_as_transformers(engine, twin):
    """Every spec meets four of the prompts, one of them with two pictures."""
    *single, two = twin.prompts(1)
    jobs = [
        (single[(number + at) % len(single)], spec) for number, spec in enumerate(SPECS) for at in range(3)
    ]
    jobs += [(two, spec) for spec in SPECS]
    random.Random(0).shuffle(jobs)
    assert differing(engine, twin, jobs) == []


@pytest.mark.slow
def test_sixty_prompts_times_eleven_specs(engine, twin):
    jobs = shuffled(twin.prompts(6), SPECS)
    assert len(jobs) >= 600
    assert differing(engine, twin, jobs) == []


def test_the_prompt_is_as_long_as_what_is_kept(engine, twin):
    one, *_, two = twin.prompts(1)
    lengths = [
        [len(output.prompt_token_ids) for output in answers(engine, [p.request(spec) for p in (one, two)])]
        for spec in ("dense", "divprune@36")
    ]
    assert [dense - kept for dense, kept in zip(*lengths, strict=True)] == [144 - 36, 2 * (144 - 36)]
    assert [len(output.prompt_token_ids) for output in answers(engine, [one.request(None)])] == lengths[1][:1]


def test_text_without_a_picture_is_left_alone(engine, twin):
    prompt = twin.prompts(1)[0]
    text = [token for token in prompt.ids if token != twin.image]
    outputs = answers(engine, [{"prompt_token_ids": text}, prompt.request("uniform@36")])
    import torch

    with torch.no_grad():
        own = twin.model.generate(input_ids=torch.tensor([text]), max_new_tokens=NEW, do_sample=False)
    assert list(outputs[0].outputs[0].token_ids) == own[0, len(text) :].tolist()
    assert list(outputs[1].outputs[0].token_ids) == twin.answer(prompt, "uniform@36")


def test_a_prefix_is_shared_by_one_spec_and_by_no_other(engine, twin):
    prompt = twin.prompts(1)[1]
    cached = [
        answers(engine, [prompt.request(spec)])[0].num_cached_tokens
        for spec in ("random(seed=7)@40", "random(seed=7)@40", "random(seed=8)@40")
    ]
    before = prompt.ids.index(twin.image)
    assert cached[0] <= before and cached[1] == 32 and cached[2] <= before


def test_what_another_version_of_vlmprune_made_is_taken_from_no_cache(engine, twin, monkeypatch):
    """Fails when the version is left out of the identity of a picture."""
    prompt = twin.prompts(1)[1]
    before = prompt.ids.index(twin.image)

    def cached() -> int:
        return answers(engine, [prompt.request("random(seed=7)@43")])[0].num_cached_tokens

    assert cached() <= before and cached() == 32
    monkeypatch.setattr("vlmprune.serving.vllm.processor.__version__", "0.0.1")
    assert cached() <= before and cached() == 32


def test_without_the_spec_in_the_key_answers_are_wrong(engine, twin, monkeypatch):
    """The mutant: two specs of one count, with the identity of a picture that does not say which."""
    from dataclasses import replace

    from vlmprune.serving.names import KEY, VERSION_KEY
    from vlmprune.serving.vllm.llava import LlavaProcessor

    original = LlavaProcessor._get_mm_hashes

    def blind(self, inputs):
        named = inputs.hf_processor_mm_kwargs.items()
        kept = {key: value for key, value in named if key not in (KEY, VERSION_KEY)}
        return original(self, replace(inputs, hf_processor_mm_kwargs=kept))

    jobs = [(p, spec) for p in twin.prompts(1) for spec in ("random(seed=1)@9", "pool@9", "divprune@9")]
    assert [one for one in differing(engine, twin, jobs) if "random" not in one[0]["vlmprune"]] == []
    monkeypatch.setattr(LlavaProcessor, "_get_mm_hashes", blind)
    jobs = [(p, spec) for p in twin.prompts(2)[::2] for spec in ("uniform@10", "pool@10", "divprune@10")]
    assert differing(engine, twin, jobs) != []


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("nonsense@9", "unknown"),
        ("fastv(layer=2)@9", "slot 'inside_lm'"),
        ("fastervlm(layer=-1)@9", "first 5 of 6 blocks"),
        ("divprune@9/total", "per total"),
        (7, "expected a spec"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_lives(engine, twin, spec, why):
    from vllm.exceptions import VLLMValidationError

    prompt = twin.prompts(1)[0]
    with pytest.raises(VLLMValidationError, match=why):
        answers(engine, [prompt.request(spec)])
    assert differing(engine, twin, [(prompt, "divprune@36")]) == []


def test_a_picture_that_is_not_finite_is_cut_by_uniform_and_counted(engine, twin, monkeypatch):
    import torch

    from vlmprune.serving.tally import TALLY
    from vlmprune.serving.vllm.llava import LlavaForConditionalGeneration

    encode = LlavaForConditionalGeneration.encode

    def broken(self, request, **kwargs):
        pictures = encode(self, request, **kwargs)
        pictures[0].features[5] = torch.nan
        return pictures

    monkeypatch.setattr(LlavaForConditionalGeneration, "encode", broken)
    prompt, spec = twin.prompts(1)[0], "divprune@11"
    (output,) = answers(engine, [prompt.request(spec)])
    assert len(output.outputs[0].token_ids) > 0
    counts = TALLY.by_spec[spec]
    assert (counts.pictures, counts.dense, counts.kept, counts.fallbacks) == (1, 144, 11, 1)
    from prometheus_client import REGISTRY

    assert REGISTRY.get_sample_value("vlmprune_fallbacks_total", {"spec": spec}) == 1


def test_requests_are_counted_for_prometheus(engine, twin):
    from prometheus_client import REGISTRY

    prompt, label = twin.prompts(1)[-1], {"spec": "divprune@13"}
    answers(engine, [prompt.request("divprune@13")] * 2)
    names = ("vlmprune_pictures_total", "vlmprune_dense_tokens_total", "vlmprune_kept_tokens_total")
    assert [REGISTRY.get_sample_value(name, label) for name in names] == [4, 4 * 144, 4 * 13]


@pytest.mark.parametrize("name", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_a_family_in_the_wrapper_is_refused_on_several_ranks(name):
    from types import SimpleNamespace

    from vlmprune.errors import UnsupportedError
    from vlmprune.serving.vllm.wrapped import refuse_ranks

    ranks = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1}
    refuse_ranks(SimpleNamespace(**ranks))
    with pytest.raises(UnsupportedError, match=f"{name}=2 was not measured"):
        refuse_ranks(SimpleNamespace(**ranks | {name: 2}))
