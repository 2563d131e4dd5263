# SPDX-License-Identifier: Apache-2.0
"""What the demo answers, without a browser: specs side by side, what is refused, users at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import vlmprune
from vlmprune.core.budget import Budget
from vlmprune.demo import playground as module
from vlmprune.demo.cards import answered
from vlmprune.demo.playground import LEAST_SIDE, MOST_METHODS, Playground, offered, spec_of
from vlmprune.errors import SpecError
from vlmprune.hooks.patches import PatchedMethod
from vlmprune.models import adapter_for
from vlmprune.testing.tiny import picture, tiny_bundle


@pytest.fixture(scope="module")
def ground():
    return Playground.load("tiny")


@pytest.fixture(scope="module")
def asked():
    return vlmprune.example()


def test_all_tokens_come_first_and_then_every_method_once(ground, asked):
    found = ground.compare(asked.picture, asked.question, ["fastervlm", "random", "fastervlm"], 0.25)
    assert [one.spec for one in found] == ["dense", "fastervlm@0.25", "random@0.25"]
    assert [(one.tokens, one.dense) for one in found] == [(144, 144), (36, 144), (36, 144)]
    assert [one.problem for one in found] == [""] * 3
    assert found[0].answer.replace(" ", "") == asked.answer and found[0].right is True
    assert all(0 < one.first <= one.total and one.choosing < one.first for one in found)


def test_a_card_shows_what_was_kept_large_enough_to_see(ground, asked):
    dense, kept = ground.compare(asked.picture, asked.question, ["fastervlm"], 0.125)
    assert min(dense.drawn.size) >= LEAST_SIDE and dense.drawn.size == kept.drawn.size
    enlarged = np.asarray(asked.picture.convert("RGB").resize(dense.drawn.size, 0))
    assert (np.asarray(dense.drawn) == enlarged).all()
    with vlmprune.prune(model := vlmprune.load("tiny")[0], "fastervlm@18") as run:
        model(**vlmprune.encode(model, vlmprune.load("tiny")[1], asked.picture, asked.question))
    assert (np.asarray(kept.drawn) == np.asarray(run.last.keep[0].draw(dense.drawn))).all()


def test_a_method_inside_the_language_model_says_what_its_layers_read(ground, asked):
    (_, one) = ground.compare(asked.picture, asked.question, ["fastv(layer=2)@18"])
    assert one.tokens == 18 and one.layer_tokens == (2 * 144 + 6 * 18) / 8


def test_what_one_method_cannot_do_is_said_in_its_card_and_the_others_answer(ground, asked):
    methods = ["nosuch", "fastervlm@0", "downsample@18", "evs", "uniform"]
    found = ground.compare(asked.picture, asked.question, methods, 0.25)
    assert [bool(one.problem) for one in found] == [False, True, True, True, True, False]
    said = {one.spec: one.problem for one in found if one.problem}
    assert list(said) == ["nosuch", "fastervlm@0", "downsample@18", "evs"]
    for text, words in zip(said.values(), ("unknown", "no budget", "llava", "clip"), strict=True):
        assert words in text and "this question" not in text


def test_a_failure_inside_of_a_forward_is_the_sentence_of_its_cause(ground, asked, monkeypatch):
    def broken(self, tokens):
        raise SpecError("the formula has a hole; mend it")

    monkeypatch.setattr("vlmprune.methods.fastervlm.FasterVLM.score", broken)
    (_, one) = ground.compare(asked.picture, asked.question, ["fastervlm"])
    assert one.problem == "the formula has a hole; mend it"


def answered_by(ground, asked, names):
    found = {}
    for start in range(0, len(names), MOST_METHODS):
        some = names[start : start + MOST_METHODS]
        outcomes = ground.compare(asked.picture, asked.question, some, 0.5)[1:]
        found |= dict(zip(some, outcomes, strict=True))
    return found


def test_methods_of_every_kind_are_offered_and_answer(ground, asked):
    names = ["tome", "debias", "mmr", "pool", "prumerge"]
    assert set(names) <= set(offered())
    found = answered_by(ground, asked, names)
    assert {name: one.problem for name, one in found.items() if one.problem} == {}
    assert all(one.tokens < one.dense for one in found.values())


@pytest.mark.slow
def test_every_offered_method_answers_or_says_why_not(ground, asked):
    names = offered()
    found = answered_by(ground, asked, names)
    assert len(names) > 25 and {name for name, one in found.items() if one.problem} == {"var"}
    assert "backbone" in found["var"].problem


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("fastervlm", "fastervlm@0.25"),
        ("fastervlm@18", "fastervlm@18"),
        ("fastv(layer=2)", "fastv(layer=2)@0.25"),
        ("debias", "debias+fastervlm@0.25"),
        ("var", "var+fastervlm@0.25"),
        ("tome", "tome@0.25/crop"),
        ("visionzip@64+pyramiddrop@0.5", "visionzip@64+pyramiddrop@0.5"),
        ("dense", "dense"),
        ("blind", "blind"),
        ("prumerge", "prumerge@0.25"),
    ],
)
def test_a_name_gets_the_budget_of_the_slider(text, spec):
    assert str(spec_of(text, Budget(0.25))) == spec


@pytest.mark.parametrize(
    "text",
    [
        "visionselector(weights=secrets)@9",
        "textmonkey( weights = 'x')@9",
        "act(recipe=x)+fastervlm@9",
        "debias(trend='/etc/passwd.json')+fastervlm@9",
        'debias(trend="x.json")+fastervlm@9',
    ],
)
def test_no_file_of_the_server_is_opened_for_a_user(monkeypatch, ground, asked, text):
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_: pytest.fail("a file was read"))
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda *_: pytest.fail("a file was read"))
    (_, one) = ground.compare(asked.picture, asked.question, [text])
    assert "may name a file, which a page opens for nobody" in one.problem


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"picture": None}, "no picture; upload one"),
        ({"question": "  "}, "question is empty"),
        ({"question": "why " * 200}, "799 characters; expected at most 500"),
        ({"methods": ["random"] * 9}, "9 methods were chosen; expected at most 8"),
        ({"keep": 0.0}, "keep=0.0 is no budget"),
        ({"picture": __file__}, "cannot be read as a picture"),
        ({"picture": picture(size=(1, 60000))}, "1 x 2000 pixels; expected no side more than 100 times"),
    ],
)
def test_a_question_that_nobody_could_answer_is_refused_whole(ground, asked, given, words):
    values = {"picture": asked.picture, "question": asked.question, "methods": [], "keep": 0.5} | given
    with pytest.raises(SpecError, match=words):
        ground.compare(**values)


def test_right_and_wrong_are_said_of_known_questions_only(ground, asked):
    assert ground.compare(asked.picture, asked.question, ["blind"])[1].right is False
    assert ground.compare(asked.picture, "what is this ?", [])[0].right is None
    assert ground.compare(picture(), asked.question, [])[0].right is None


def test_a_smaller_picture_is_drawn_small_and_counted_against_the_whole():
    ground = Playground(*tiny_bundle("qwen2_vl"), "tiny qwen", max_new_tokens=2)
    whole, small = ground.compare(picture(size=(336, 336)), "what ?", ["downsample"], 0.25)
    assert small.problem == "" and small.dense == whole.dense and small.tokens <= whole.dense // 4


def test_a_second_look_answers_and_shows_its_region(ground, asked):
    model, processor = vlmprune.load("tiny")
    (dense, again) = ground.compare(asked.picture, asked.question, ["carve"])
    twin = vlmprune.refine(
        model, processor, asked.picture, asked.question, max_new_tokens=ground.max_new_tokens
    )
    assert (again.problem, again.answer) == ("", twin.answer)
    assert (again.tokens, again.dense, again.layer_tokens) == (
        4 * dense.tokens,
        dense.tokens,
        4 * dense.tokens,
    )
    assert again.drawn.size[0] % twin.image.size[0] == 0
    (_, cut) = ground.compare(asked.picture, asked.question, ["carve+fastervlm"], 0.25)
    assert cut.spec == "carve+fastervlm@0.25" and cut.tokens == dense.tokens


def test_tiles_that_are_pictures_to_the_model_count_as_one():
    (model, processor), wide = tiny_bundle("internvl"), picture(size=(450, 150))
    ground = Playground(model, processor, "tiny internvl", max_new_tokens=2)
    whole, cut = ground.compare(wide, "what ?", ["divprune"], 0.25)
    assert (whole.problem, cut.problem) == ("", "")
    tiles = adapter_for(model).parts(processor, wide)
    assert tiles > 1 and cut.dense == whole.dense == whole.tokens and whole.dense % tiles == 0
    assert cut.tokens == tiles * (whole.dense // tiles // 4)


# --- several users --------------------------------------------------------------------------------


def test_users_at_the_same_time_get_what_they_would_get_alone(ground, asked):
    requests = [["random@9"], ["fastv(layer=2)@18"], ["tome@36/crop"]]
    alone = [ground.compare(asked.picture, asked.question, methods) for methods in requests]
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda m: ground.compare(asked.picture, asked.question, m), requests))
    for one, other in zip(alone, together, strict=True):
        assert [(a.spec, a.answer, a.tokens) for a in one] == [(b.spec, b.answer, b.tokens) for b in other]
    model, _ = ground._idle.get()
    ground._idle.put((model, _))
    assert not [value for value in vars(model.model).values() if isinstance(value, PatchedMethod)]


def most_at_once(monkeypatch, ground, asked, users):
    """How many users were answered at the same time."""
    lock, now, most = threading.Lock(), [0], [0]
    everybody = threading.Barrier(users)
    entrant = module.entrant

    def watched(model, processor, spec):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        try:  # where others can come, wait for them
            everybody.wait(timeout=0.5)
        except threading.BrokenBarrierError:
            everybody.reset()
        with lock:
            now[0] -= 1
        return entrant(model, processor, spec)

    monkeypatch.setattr(module, "entrant", watched)
    with ThreadPoolExecutor(users) as pool:
        found = list(pool.map(lambda _: ground.compare(asked.picture, asked.question, []), range(users)))
    assert [one[0].right for one in found] == [True] * users
    return most[0]


def test_a_copy_answers_one_user_at_a_time(monkeypatch, ground, asked):
    assert most_at_once(monkeypatch, ground, asked, 2) == 1


def test_as_many_users_are_answered_as_there_are_copies(monkeypatch, asked):
    model, processor = vlmprune.load("tiny")
    assert most_at_once(monkeypatch, Playground(model, processor, copies=2), asked, 2) == 2


def test_a_copy_is_given_back_when_something_breaks(monkeypatch, ground, asked):
    def broken(*args, **options):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(module, "entrant", broken)
        with pytest.raises(RuntimeError, match="no memory"):
            ground.compare(asked.picture, asked.question, [])
    assert ground.compare(asked.picture, asked.question, [])[0].right is True


@pytest.mark.parametrize("wrong", [{"copies": 0}, {"copies": 1.5}, {"max_new_tokens": 0}])
def test_a_playground_needs_a_copy_and_a_word(wrong):
    with pytest.raises(SpecError, match="expected a whole number, at least 1"):
        Playground(None, None, **wrong)


# --- what the page is given -----------------------------------------------------------------------


def test_the_page_gets_cards_or_one_sentence(ground, asked):
    page = answered(ground, asked.picture, asked.question, ["fastervlm"], 25)
    assert page.count('class="vp-card"') == 2 and "fastervlm@0.25" in page and "36 of 144" in page
    page = answered(ground, None, asked.question, None, 25)
    assert 'role="alert">there is no picture; upload one' in page
    assert 'class="vp-card"' not in page
