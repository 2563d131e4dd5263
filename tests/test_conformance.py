# SPDX-License-Identifier: Apache-2.0
"""Every method on every family: the named checks that ``vlmprune verify`` runs, one test each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from later_families import FIRST, LATER, sampled, slow_tests_run

from vlmprune.api import prune
from vlmprune.errors import UnsupportedError
from vlmprune.hooks.attention_call import AttentionCall
from vlmprune.hooks.sequence import views
from vlmprune.hooks.sequence.views import SequenceView
from vlmprune.hooks.slots import before_lm
from vlmprune.hooks.slots.inside_lm import InsideLM
from vlmprune.registry import attachable_methods, get
from vlmprune.testing.conformance import Subject, all_checks, checks_for, default_spec, run_check, run_checks
from vlmprune.testing.families import family_of, layout_of
from vlmprune.testing.tiny import FAMILIES, LLAVA_FAMILIES, VARIANTS

METHODS = [name for name in attachable_methods() if get(name).__module__.startswith("vlmprune.")]
OPTIONS = [
    "fastervlm(cls=mean)@9",
    "visionzip(cls=mean)@12",
    "visionzip(contextual=2,combine=mean)@12",
    "visionzip(cls=mean,place=after)@12",
    "random(seed=3)@0.3",
    "fastervlm@4/crop",
    "random@5/crop",
    "random@20/total",
    "divprune@20/total",
    "pool@5/crop",
    "fastv(layer=1)@0.4",
    "fastv(layer=3)@50",
    "pyramiddrop(layers=[1,3])@0.4",
]
YOUNGER = [family for family in FIRST if family not in LLAVA_FAMILIES]


def by_default(method: str, family: str) -> bool:
    """Every method on LLaVA, an eighth of the cells of its relatives; clips on OneVision and a few others."""
    if get(method).clips:
        return family == "llava_onevision" or sampled(f"{method} on {family}", 12)
    return family == "llava" or (family in LLAVA_FAMILIES and sampled(f"{method} on {family}", 8))


# what every method is held to in each run; of the other checks a tenth, by name
ALWAYS = ("keep_all_is_dense", "cut_equals_hand_built", "batch_row_equals_alone", "order_and_report")


def quick(subject: Subject, check: str) -> bool:
    if subject.clips:  # clips are longer than pictures
        return check == "cut_equals_hand_built" or sampled(f"{subject.spec} on {subject.family} {check}", 10)
    return check in ALWAYS or sampled(f"{subject.spec} on {subject.family} {check}", 10)


CLIPS = [family for family in FAMILIES if layout_of(family).video is not None]
CELLS = [(method, family) for method in METHODS for family in (CLIPS if get(method).clips else FAMILIES)]
# the others run a method of each kind by default
ALL_CHECKS = "fastervlm(cls=mean)@0.25"
SOME_CHECKS = {
    "fastv@0.25": ("cut_equals_hand_built", "second_turn"),
    "pool@0.25": ("cut_equals_hand_built",),
    default_spec("var"): ("edit_equals_eager_twin", "composes_with_a_cut"),
}
MODES = "every_mode_equals_kept_embeddings"  # the longest: one of two methods by turns
spec_of = lru_cache(maxsize=None)(default_spec)


def sample() -> Iterator[tuple[Subject, str]]:
    """Checks of methods of each kind on families that do not run all of them."""
    for number, family in enumerate(YOUNGER):
        yield Subject(("fastv@0.25", "pool@0.25")[number % 2], family), MODES
        main = Subject(ALL_CHECKS, family)
        yield from ((main, check) for check in all_checks() if quick(main, check))
        for spec, checks in SOME_CHECKS.items():
            yield from ((Subject(spec, family), check) for check in checks)
    # of the families that came later a few checks each, by name
    for family in LATER:
        first = ALL_CHECKS if family_of(family).reads_tower else "divprune@0.25"
        for spec in (first, "fastv@0.25"):
            for check in all_checks():
                if sampled(f"{spec} {family} {check}", 30):
                    yield Subject(spec, family), check
    # words in the middle of a prompt that attends both ways look ahead when they rank
    yield Subject(spec_of("sparsevlm"), "paligemma"), "cut_equals_hand_built"


def more() -> Iterator[Subject]:
    """What runs with all checks where slow tests are asked for."""
    for spec in OPTIONS:
        yield from (Subject(spec, family) for family in ("llava", "llava_next", "llava_onevision"))
    yield from (
        Subject(spec_of(method), family) for method, family in CELLS if not by_default(method, family)
    )
    for variant in VARIANTS:
        for spec in ("fastervlm@9", "random@9", "fastv@9", "pyramiddrop@0.5"):
            yield Subject(spec, *variant)


def name_of(subject: Subject) -> str:
    return "-".join(filter(None, (subject.spec, subject.family, subject.tower, subject.text)))


# what a family may answer instead of passing: the nearest thing that works, which it must name, and the
# families that may say so
NO_CLS = {
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics3",
    "smolvlm",
    "fast_vlm",
    "internvl",
    "paligemma",
    "gemma3",
    *LATER,
}
MERGERS = {
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "cosmos3_omni", "cohere_compass", "glmga"),
    *("exaone4_5", "lfm3_vl", "cosmos3_edge", "paddleocr_vl"),
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "glm4v",
    "glm46v",
    "glm4v_moe",
    "glm_ocr",
}
UNREAD = {family for family in FAMILIES if not family_of(family).reads_tower}
HYBRID = {family for family in FAMILIES if family_of(family).hybrid}
REFUSALS = {
    "reads features only": UNREAD,
    "cls='mean'": NO_CLS,
    "estimator='zo'": {*MERGERS, *LATER, "idefics3", "smolvlm", "paligemma", "gemma3"},
    "become": MERGERS,
    "eager attention only": {"paligemma"},
    # layers hold several states of a token, or are of a kind whose mask cannot be made again
    "prune before the language model": {"gemma3n", "granite4_vision", "nemotron_h_omni"},
    "method that keeps tokens": {"granite4_vision"},  # layers add features to tokens, made rows have none
    "inside the vision tower": {
        "vipllava",
        "video_llava",
        "fast_vlm",
        "internvl",
        "idefics3",
        "smolvlm",
        "gemma3",
        *MERGERS,
        *LATER,
    },
    "a method that needs none": NO_CLS,  # FlowCut is defined by [CLS]
    "norm='l2'": {"hyperclovax_vision_v2"},  # its padding has positions, too
    "choose another layer": HYBRID,  # few of whose layers attend
    "takes no budget": set(FAMILIES),
    "vlmprune train": set(FAMILIES),  # trained methods ship no weights
    "keeps nothing": set(FAMILIES),
    "generate with a cache": set(FAMILIES),
    # a loop over a clip without masks; one without a cache, which this model does not make by itself
    "without pruning too": {
        *("qwen2_5_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "granite4_vision"),
    },
}


def may_refuse(subject: Subject, detail: str) -> bool:
    siglip = subject.tower == "siglip" and "cls='mean'" in detail
    shares = subject.text == "gemma4_small" and "keys of earlier ones" in detail
    return (
        siglip
        or shares
        or any(hint in detail and subject.family in families for hint, families in REFUSALS.items())
    )


def case(subject: Subject, check: str, *, slow: bool = False) -> Any:
    marks = pytest.mark.slow if slow else ()
    return pytest.param(subject, check, id=f"{name_of(subject)}-{check}", marks=marks)


def cases(slow: bool) -> Iterator[Any]:
    """Every cell that a run has: twenty thousand with the slow ones, which take long to make."""
    quickly = [Subject(spec_of(method), family) for method, family in CELLS if by_default(method, family)]
    for subject in quickly:
        for check in checks_for(subject):
            if slow or quick(subject, check):
                yield case(subject, check, slow=not quick(subject, check))
    yield from (case(subject, check) for subject, check in sample())
    if slow:
        for subject in more():
            yield from (case(subject, check, slow=True) for check in checks_for(subject))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_conformance:
        metafunc.parametrize(("subject", "check"), list(cases(slow_tests_run(metafunc.config))))


def test_conformance(subject: Subject, check: str) -> None:
    result = run_check(check, checks_for(subject)[check], subject)
    if result.status == "unsupported" and (
        "install" in result.detail or "swaps forward methods" in result.detail
    ):
        pytest.skip(result.detail)  # transformers 4.57 is not thread-safe by itself, and lacks families
    if result.status == "unsupported":
        assert may_refuse(subject, result.detail), result.detail
        return
    assert result.status == "pass", result.detail


@pytest.mark.parametrize("method", [name for name in METHODS if get(name).clips])
def test_methods_for_clips_are_refused_where_there_are_none(method: str) -> None:
    model = Subject("uniform@9", "llava").model
    with pytest.raises(UnsupportedError, match="takes images only; where the images"):
        prune(model, default_spec(method))


def test_run_checks_reports_every_check_of_every_family_asked_for() -> None:
    seen = []
    results = run_checks("uniform", ["llava"], seen.append)
    assert (
        results == seen
        and {r.check for r in results} == set(all_checks())
        and {r.family for r in results} == {"llava"}
    )


def test_a_bare_name_gets_a_budget_that_its_schedule_can_meet() -> None:
    bare = ("uniform", "fastv", "pyramiddrop")
    assert [default_spec(name) for name in bare] == ["uniform@0.25", "fastv@0.25", "pyramiddrop@0.5"]
    scheduled = "pyramiddrop(shares=(0.5,0.4,0.3))"
    assert [default_spec(spec) for spec in ("fastv@9", scheduled)] == ["fastv@9", scheduled]


def test_a_schedule_without_a_budget_is_checked_as_far_as_it_goes() -> None:
    results = run_checks("pyramiddrop(shares=[0.5,0.4,0.3])", ["llava"])
    by_status = {
        status: {r.check for r in results if r.status == status} for status in ("fail", "unsupported")
    }
    assert by_status["fail"] == set() and {"keep_all_is_dense", "more_keeps_more"} <= by_status["unsupported"]


def test_a_broken_method_fails_conformance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks can fail: a cut that shifts every kept token by one is caught."""
    to_slots = before_lm.to_slots

    def shifted(picture, parts, *rest):
        cut = to_slots(picture, parts, *rest)
        if cut is not None and cut.rows is None:
            cut.kept_slots = (cut.kept_slots + 1) % picture.length
        return cut

    monkeypatch.setattr(before_lm, "to_slots", shifted)
    failed = {r.check for r in run_checks("uniform@9", ["llava"]) if r.status == "fail"}
    assert "cut_equals_hand_built" in failed


def rank_by_an_earlier_word(self, state, index, original=InsideLM._queries):
    rows, real = original(self, state, index)
    return rows - 1, real


def recount_positions(self, language_model, layer, hidden, original=SequenceView.angles):
    plain = torch.arange(hidden.shape[1])[None] if self.start else self.position_ids
    return original(replace(self, position_ids=plain), language_model, layer, hidden)


def make_no_mask(config, kind, layer, hidden, valid, held, cache):
    return None


def attend_from_everywhere(self, rows, original=AttentionCall.attention):
    every = torch.arange(self.queries.shape[2])[None].expand(self.queries.shape[0], -1)
    return original(self, every).gather(2, rows[:, None, :, None].expand(-1, 4, -1, self.keys.shape[2]))


@pytest.mark.parametrize(
    ("owner", "name", "mistake", "caught_by"),
    [
        (InsideLM, "_queries", rank_by_an_earlier_word, "cut_equals_hand_built"),
        (SequenceView, "angles", recount_positions, "cut_equals_hand_built"),
        (views, "causal_mask", make_no_mask, "every_mode_equals_kept_embeddings"),
        (AttentionCall, "attention", attend_from_everywhere, "no_attention_map"),
    ],
)
def test_a_broken_cut_inside_the_language_model_fails_conformance(
    monkeypatch, owner, name, mistake, caught_by
) -> None:
    monkeypatch.setattr(owner, name, mistake)
    assert caught_by in {r.check for r in run_checks("fastv@9", ["llava"]) if r.status == "fail"}
