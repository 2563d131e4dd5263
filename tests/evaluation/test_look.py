# SPDX-License-Identifier: Apache-2.0
"""Specs that ask a second time: answers equal ``vlmprune.refine``, and all that was read is counted."""

from __future__ import annotations

import pytest

import vlmprune
from vlmprune.errors import EvaluationError, SpecError, UnsupportedError
from vlmprune.evaluation.answer.evaluate import entrant, evaluate
from vlmprune.evaluation.answer.look import look_of, with_region
from vlmprune.evaluation.leaderboard.config import Config
from vlmprune.evaluation.leaderboard.run import leaderboard
from vlmprune.evaluation.tasks.shapes import shapes

WORDS = 4


@pytest.fixture(scope="module")
def loaded():
    return vlmprune.load("tiny")


@pytest.fixture(scope="module")
def questions():
    """Questions of one turn about one picture, and one about two pictures."""
    every = shapes().samples("test", 40)
    single = [one for one in every if len(one.images) == 1 and not one.history][:3]
    return single, next(one for one in every if len(one.images) == 2)


def asked(loaded, samples, *specs: str):
    return list(evaluate(*loaded, samples, specs, shapes(), batch_size=4, max_new_tokens=WORDS))


@pytest.mark.parametrize("rest", ["dense", "fastervlm@36"])
def test_answers_are_those_of_refine_and_all_that_is_read_is_counted(loaded, questions, rest: str) -> None:
    single, _ = questions
    spec = "carve(steps=first)" + (f"+{rest}" if rest != "dense" else "")
    found = asked(loaded, single, spec)
    kept = 144 if rest == "dense" else 36
    for sample, record in zip(single, found, strict=True):
        with vlmprune.prune(loaded[0], rest):
            twin = vlmprune.refine(
                *loaded, sample.load_images()[0], sample.question, steps="first", max_new_tokens=WORDS
            )
        assert record.answer == twin.answer
        assert record.spec == spec
        # the picture twice, then the picture and its region
        assert (record.dense_tokens, record.realised_tokens, record.layer_tokens) == (144, 4 * kept, 4 * kept)
        assert [len(one.keep_idx) for one in record.keep] == [kept]
        assert (record.batch, record.encoding) == (1, "each")
        assert 0 < record.seconds["first_token"] <= record.seconds["total"]


def test_the_second_answer_can_be_another_one(loaded) -> None:
    """Where both looks always agreed, the test above could not tell them apart."""
    every = [one for one in shapes().samples("test", 24) if len(one.images) == 1 and not one.history]
    first = asked(loaded, every, "dense")
    second = asked(loaded, every, "carve")
    assert [one.id for one in first] == [one.id for one in second]
    assert [one.answer for one in first] != [one.answer for one in second]


def test_two_pictures_are_asked_about_once_and_the_order_stays(loaded, questions) -> None:
    single, pair = questions
    records = asked(loaded, [single[0], pair], "carve", "dense")
    again = [one for one in records if one.spec == "carve"]
    (once,) = [one for one in records if one.spec == "dense" and one.id == pair.id]
    assert [one.id for one in again] == [single[0].id, pair.id]
    assert (again[1].answer, again[1].realised_tokens) == (once.answer, once.realised_tokens)


def test_earlier_turns_stay_in_the_second_question() -> None:
    sample = next(one for one in shapes().samples("test", 40) if one.history)
    plain, second = sample.messages(), with_region(sample)
    kinds = [[part["type"] for part in turn["content"]] for turn in second]
    assert kinds[0] == ["image", "image", "text"]
    assert second[1:] == plain[1:]


def test_a_leaderboard_has_a_row_and_the_model_is_free_afterwards(tmp_path) -> None:
    values = {"models": ["tiny"], "specs": ["carve+fastervlm"], "keep": [36], "limit": 6, "max_new_tokens": 2}
    found = leaderboard(Config.of(values), tmp_path)
    assert found["failed"] == []
    row = next(row for row in found["rows"] if row["spec"] == "carve+fastervlm@36")
    beside = next(row for row in found["rows"] if row["spec"] == "uniform@36")
    assert 3 * beside["layer_tokens"] < row["layer_tokens"] <= 4 * beside["layer_tokens"]


def test_the_model_is_free_where_a_call_fails(loaded, questions) -> None:
    single, _ = questions
    model = loaded[0]

    def broken(module, args):
        raise RuntimeError("no memory")

    hook = model.model.language_model.layers[-1].register_forward_pre_hook(broken)
    try:
        with pytest.raises(EvaluationError, match=r"carve: generation failed on sample .*no memory"):
            asked(loaded, single[:1], "carve")
    finally:
        hook.remove()
    busy = r"carve: the second look failed on sample .*attached already"
    with vlmprune.prune(model, "dense"), pytest.raises(EvaluationError, match=busy):
        asked(loaded, single[:1], "carve")
    with vlmprune.prune(model, "fastervlm@36") as run:
        assert run.attached


def test_what_looks_again_and_what_prunes_are_told_apart() -> None:
    method, rest = look_of("debias+fastv@9+carve(min_regions=2)")
    assert (method.min_regions, rest) == (2, "debias+fastv@9")
    assert look_of("carve")[1] == "dense"
    with pytest.raises(SpecError, match="expected 'carve' once"):
        look_of("carve+carve(steps=first)")


@pytest.mark.parametrize(
    ("spec", "frames", "error", "message"),
    [
        ("carve", True, UnsupportedError, "ask about clips with 'dense'"),
        ("carve(layers=[0,99])", False, SpecError, "decoder layers of 0..7"),
        ("carve+downsample@9", False, SpecError, "write it alone"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_before_a_question(loaded, spec, frames, error, message) -> None:
    with pytest.raises(error, match=message):
        entrant(*loaded, spec, frames=frames)


def test_it_attaches_nothing_and_says_what_to_call(loaded) -> None:
    for attempt in (lambda: vlmprune.prune(loaded[0], "carve"), lambda: vlmprune.select("carve")):
        with pytest.raises(UnsupportedError, match=r"vlmprune\.refine\("):
            attempt()
