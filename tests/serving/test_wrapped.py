# SPDX-License-Identifier: Apache-2.0
"""Families in vLLM's wrapper of transformers: answers are those of vlmprune.prune.

The wrapper decorates classes of transformers, so that no model of them can run by itself in this process any
more: what transformers answers is computed before the first engine starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import served_engine
from served_engine import Job, ids_of
from served_tiny import FAMILIES, NEW, TinyTwin, save

from vlmprune.serving.vllm.families import MARKED, PLACED
from vlmprune.serving.vllm.layouts import LAYOUTS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
REFUSED = {
    "aria": ("uniform@9", "rows and columns that tokens form"),
    "got_ocr2": ("fastervlm(cls=mean)@9", "cannot be read of this vision tower"),
    "perception_lm": ("fastervlm(cls=mean)@9", "cannot be read of this vision tower"),
    "llava_next_video": ("zooprune@9", "projector, which cannot be read here"),
    "vipllava": ("zooprune@9", "projector, which cannot be read here"),
}
OF_TIMM = ("fast_vlm", "perception_lm")  # whose towers need it
OTHERS = ("fastervlm@9", "cls=mean")  # of the rest, whose towers have no [CLS]


@dataclass
class Prepared:
    """A family: its model in a folder, and what transformers answers."""

    folder: Path
    asked: dict[str, Any]
    never: dict[int, float]
    jobs: list[Job]
    after_a_refusal: list[Job]
    with_a_fault: list[Job]
    for_mutants: list[Job]


@dataclass
class Served(Prepared):
    """The same in an engine."""

    family: str
    engine: Any

    def outputs(self, requests: list[dict]) -> list[Any]:
        return served_engine.outputs_of(self.engine, requests, NEW, self.never)

    def wrong(self, jobs: list[Job]) -> list[tuple]:
        return served_engine.wrong(self.engine, jobs, NEW, self.never)


def prepare(family: str, folder: Path) -> Prepared:
    save(family, folder)
    twin = TinyTwin(family, folder)
    jobs = twin.jobs(FAMILIES[family].specs, len(twin.served.shapes))
    after = twin.jobs(("divprune@11",), 1, seed=3)
    fault = twin.jobs(("uniform@13",), 1, seed=5) if LAYOUTS[family].reads else []
    # of pictures and specs that are in no cache
    mutants = twin.jobs(("uniform@19", "uniform@21"), 4, seed=11) if family in PLACED | MARKED else []
    return Prepared(folder, twin.served.asked, twin.never, jobs, after, fault, mutants)


@pytest.fixture(scope="module")
def prepared(request, tmp_path_factory) -> dict[str, Prepared]:
    """Of every family that will be asked for: they share classes of language models."""
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    families = dict.fromkeys(call.params["served"] for call in calls if call and "served" in call.params)
    if find_spec("timm") is None:
        families = {name: True for name in families if name not in OF_TIMM}
    return {family: prepare(family, tmp_path_factory.mktemp(family)) for family in families}


@pytest.fixture(scope="module", params=[name for name, one in FAMILIES.items() if one.wrapped])
def served(request, prepared):
    if request.param not in prepared:
        pytest.skip("its tower needs timm")
    made = prepared[request.param]
    steps = {"max_num_batched_tokens": 512, "long_prefill_token_threshold": 24}
    options = {"mm_processor_kwargs": made.asked or None, "enable_prefix_caching": True}
    with served_engine.engine(made.folder, "divprune@9", **options, **steps) as engine:
        yield Served(**vars(made), family=request.param, engine=engine)


def test_answers_are_those_of_transformers(served):
    """Every spec with every shape of prompts, then again from the caches."""
    assert served.wrong(served.jobs) == []
    again = served.outputs([request for request, _ in served.jobs])
    assert max(output.num_cached_tokens for output in again) >= 32
    assert ids_of(again) == [wanted for _, wanted in served.jobs]
    # the model is random: if what stays did not matter to its answers, they would prove nothing
    assert len({tuple(wanted) for _, wanted in served.jobs}) > len(served.jobs) // 3


def test_what_the_family_cannot_do_is_refused_and_the_engine_lives(served):
    from vllm.exceptions import VLLMValidationError

    spec, why = REFUSED.get(served.family, OTHERS)
    ((request, _),) = served.after_a_refusal
    with pytest.raises(VLLMValidationError, match=why):
        served.outputs([{**request, "mm_processor_kwargs": {"vlmprune": spec}}])
    assert served.wrong(served.after_a_refusal) == []


def test_a_clip_is_refused_and_the_engine_lives(served):
    import numpy as np
    from vllm.exceptions import VLLMValidationError

    ((request, _),) = served.after_a_refusal
    clip = np.zeros((4, 84, 84, 3), np.uint8)
    with pytest.raises(VLLMValidationError, match="At most 0 video"):
        served.outputs([{**request, "multi_modal_data": {"video": [(clip, {})]}}])
    assert served.wrong(served.after_a_refusal) == []


def test_without_places_answers_are_wrong(served, monkeypatch):
    """The mutant: kept tokens of a model with M-RoPE stand where their picture starts."""
    if served.family not in PLACED:
        pytest.skip("tokens of this family have no places")
    from vlmprune.serving.vllm import wrapped_mrope

    places = wrapped_mrope.grid_places
    monkeypatch.setattr(wrapped_mrope, "grid_places", lambda *grid: 0 * places(*grid))
    assert served.wrong(served.for_mutants) != []


def test_without_the_words_of_marks_answers_are_wrong(served, monkeypatch):
    """The mutant: marks around pictures are read as text."""
    if served.family not in MARKED:
        pytest.skip("no marks of this family have words of their own")
    from vlmprune.serving.vllm import wrapped, wrapped_marks

    plain = wrapped.TransformersMultiModalForCausalLM.embed_input_ids
    monkeypatch.setattr(wrapped_marks.MarkedMultiModalForCausalLM, "embed_input_ids", plain)
    assert served.wrong(served.for_mutants) != []


def test_attention_that_fails_its_check_falls_back_and_is_counted(served, monkeypatch):
    """Nothing may be raised in the engine: the pictures are cut by ``uniform``, to the same count."""
    if not LAYOUTS[served.family].reads or served.family == "fast_vlm":
        pytest.skip("nothing is read of this tower, or what is read is not compared")
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
