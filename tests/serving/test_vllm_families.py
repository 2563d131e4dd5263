# SPDX-License-Identifier: Apache-2.0
"""Every family inside vLLM: answers are those of vlmprune.prune with transformers.

Steps of 24 tokens cut through pictures; pages of 32 let prompts share a prefix. An engine at a time: it is
put away before the next one.
"""

from __future__ import annotations

from typing import Any

import pytest
import served_both_ways
import served_engine
import served_states
import torch
from served_engine import Job, ids_of
from served_tiny import FAMILIES, NEW, SHAPES, TinyTwin, save

pytestmark = pytest.mark.vllm
QWEN3_5 = ("qwen3_5", "qwen3_5_moe")
STATES = (*QWEN3_5, "minicpmv4_6")  # layers keep a running state
BOTH_WAYS = ("gemma3", "gemma4")  # tokens of a picture see later ones of it
OMNI = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")
M_ROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "cosmos3_omni", *OMNI, *QWEN3_5)
# the others share all code with one of these
SAMPLED = ("internvl", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
PARAMS = [
    name if name in SAMPLED else pytest.param(name, marks=pytest.mark.slow)
    for name, served in FAMILIES.items()
    if not served.wrapped  # see test_wrapped.py
]


@pytest.fixture(scope="module", params=PARAMS)
def family(request) -> str:
    if request.param == "gemma3n":
        pytest.importorskip("timm", reason="its tower needs timm")
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    made = tmp_path_factory.mktemp(family)
    save(family, made)
    return made


@pytest.fixture(scope="module")
def twin(family, folder) -> TinyTwin:
    return TinyTwin(family, folder)


@pytest.fixture(scope="module")
def both_ways(family):
    """vLLM's attention for CPUs lets tokens of pictures see earlier ones alone."""
    with pytest.MonkeyPatch.context() as patch:
        if family in BOTH_WAYS:
            served_both_ways.install(patch)
        if family == "gemma4":
            # vLLM's class divides the memory of an accelerator, which is asked for on a CPU too
            patch.setattr(torch.accelerator, "get_memory_info", lambda *device: (2**30, 2**30))
        yield


@pytest.fixture(scope="module")
def engine(family, folder, both_ways):
    limits = {"image": 2} | ({"video": 1} if family in M_ROPE else {})
    # sounds would be measured with
    limits |= {"audio": 0} if family in ("gemma3n", *OMNI) else {}
    # no step holds as many frames as would be measured with
    limits |= {"video": 0} if family == "gemma4" else {}
    options = {"max_num_batched_tokens": 512, "long_prefill_token_threshold": 24}
    if family in BOTH_WAYS:
        # what sees later tokens cannot be cut through
        options = {"max_num_batched_tokens": 512, "disable_chunked_mm_input": True}
        options["mm_processor_kwargs"] = FAMILIES[family].asked
    if family == "lfm2_vl":
        # vLLM's kernel for CPUs turns queries wrongly where heads are a dimension of their own
        options["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    if family in STATES:
        served_states.install()
    options |= {"limit_mm_per_prompt": limits, "enable_prefix_caching": True}
    with served_engine.engine(folder, "divprune@9", **options) as made:
        yield made


def outputs_of(engine, twin: TinyTwin, requests: list[dict]) -> list[Any]:
    return served_engine.outputs_of(engine, requests, NEW, twin.never)


def wrong(engine, twin: TinyTwin, jobs: list[Job]) -> list[tuple]:
    return served_engine.wrong(engine, jobs, NEW, twin.never)


def test_answers_are_those_of_transformers(family, engine, twin):
    """Then again, when prefixes and pictures are cached."""
    jobs = twin.jobs(FAMILIES[family].specs, 2)
    assert wrong(engine, twin, jobs) == []
    again = outputs_of(engine, twin, [request for request, _ in jobs])
    assert max(output.num_cached_tokens for output in again) >= 32
    assert ids_of(again) == [wanted for _, wanted in jobs]


@pytest.mark.slow
def test_every_spec_with_every_prompt(family, engine, twin):
    jobs = twin.jobs(FAMILIES[family].specs, len(SHAPES), seed=7)
    assert wrong(engine, twin, jobs) == []
    # the model is random: if what stays did not matter to its answers, they would prove nothing
    assert len({tuple(wanted) for _, wanted in jobs}) > len(jobs) // 3


def test_what_the_family_cannot_do_is_refused_and_the_engine_lives(family, engine, twin):
    from vllm.exceptions import VLLMValidationError

    asked = {
        "gemma4": ("fastervlm@9", "cannot be read of this vision tower"),
        "gemma3n": ("fastervlm@9", "cannot be read of this vision tower"),
        "granite4_vision": ("pool@9", "rows of its own in place of tokens"),
        "internvl": ("visionzip@9", "use cls=mean"),
        "qianfan_ocr": ("visionzip@9", "use cls=mean"),
        "minicpmv4_6": ("fastervlm@9", "cannot be read of this vision tower"),
        "llava_next": ("fastervlm(layer=-1)@9", "first 3 of 4 blocks"),
        "qwen2_5_vl": ("fastervlm(cls=mean, layer=1)@9", "inside windows"),
    }
    spec, why = asked.get(family, ("fastervlm@9", "cls=mean"))
    request, inputs = twin.prompt(SHAPES[0], seed=3)
    with pytest.raises(VLLMValidationError, match=why):
        outputs_of(engine, twin, [{**request, "mm_processor_kwargs": {"vlmprune": spec}}])
    job = {**request, "mm_processor_kwargs": {"vlmprune": "divprune@11"}}
    assert wrong(engine, twin, [(job, twin.answer(inputs, "divprune@11"))]) == []


def test_bounds_of_pixels_in_a_request_make_the_pictures_of_transformers(family, engine, twin):
    """Smaller pictures than those of the server, beside its own."""
    if family not in M_ROPE:
        pytest.skip("pictures of this family have no such bounds")
    jobs = []
    for number, sizes in enumerate(SHAPES[1:4]):
        for bounds in ({}, {"min_pixels": 28**2 * 2, "max_pixels": 28**2 * 16}, {"min_pixels": 28**2 * 30}):
            request, inputs = twin.prompt(sizes, 20 + number, **bounds)
            for spec in ("dense", "divprune@0.5", "fastervlm(cls=mean)@6"):
                options = {"mm_processor_kwargs": {"vlmprune": spec, **bounds}}
                jobs.append(({**request, **options}, twin.answer(inputs, spec)))
    assert wrong(engine, twin, jobs) == []


def test_bounds_above_those_of_the_server_are_refused_and_the_engine_lives(family, engine, twin):
    from vllm.exceptions import VLLMValidationError

    if family not in M_ROPE:
        pytest.skip("pictures of this family have no such bounds")
    request, inputs = twin.prompt(SHAPES[0], seed=3)
    clip, _ = twin.clip(4, (168, 168))
    for asked, bounds, why in (
        (request, {"max_pixels": 10**9}, "the most of this server"),
        (request, {"min_pixels": 900, "max_pixels": 800}, "min_pixels <= max_pixels"),
        (request, {"max_pixels": "800"}, "whole numbers"),
        (clip, {"min_pixels": 800, "max_pixels": 900}, "with a clip"),
    ):
        with pytest.raises(VLLMValidationError, match=why):
            outputs_of(engine, twin, [{**asked, "mm_processor_kwargs": {"vlmprune": "divprune@9", **bounds}}])
    job = {**request, "mm_processor_kwargs": {"vlmprune": "divprune@11"}}
    assert wrong(engine, twin, [(job, twin.answer(inputs, "divprune@11"))]) == []


def test_clips_are_pruned(family, engine, twin):
    if family not in M_ROPE or family == "qwen3_omni_moe_thinker":
        pytest.skip("clips of this family are served under dense only, or not at all")
    jobs = []
    for frames, side in ((4, (168, 168)), (8, (100, 200))):
        request, inputs = twin.clip(frames, side)
        for spec in ("dense", "evs@0.5", "fastervlm(cls=mean)@30", "uniform@17", "pool@9"):
            options = {"mm_processor_kwargs": {"vlmprune": spec}}
            jobs.append(({**request, **options}, twin.answer(inputs, spec)))
    assert wrong(engine, twin, jobs) == []


def test_without_places_answers_are_wrong(family, engine, twin, monkeypatch):
    """The mutant: kept tokens of a model with M-RoPE stand where their picture starts."""
    if family not in M_ROPE:
        pytest.skip("tokens of this family have no places")
    from vlmprune.serving.vllm import mrope, qwen_vl

    places = mrope.grid_places
    monkeypatch.setattr(qwen_vl, "grid_places", lambda *grid: 0 * places(*grid))
    assert wrong(engine, twin, twin.jobs(("uniform@19", "uniform@21"), 4, seed=11)) != []


def test_without_the_words_between_frames_answers_are_wrong(family, engine, twin, monkeypatch):
    """The mutant: the times of frames are given places, and no embeddings."""
    if family != "qwen3_vl":
        pytest.skip("nothing stands between the frames of this family")
    from vlmprune.serving.vllm import qwen3_vl

    def silent(self, tokens, rows):
        return rows.new_zeros(len(tokens), rows.shape[1])

    monkeypatch.setattr(qwen3_vl.Qwen3VLForConditionalGeneration, "_embedded", silent)
    request, inputs = twin.clip(8, (100, 200))
    jobs = [
        ({**request, "mm_processor_kwargs": {"vlmprune": spec}}, twin.answer(inputs, spec))
        for spec in ("uniform@21", "uniform@22", "divprune@23")
    ]
    assert wrong(engine, twin, jobs) != []
