# SPDX-License-Identifier: Apache-2.0
"""Training of the video model: what is asked and where it can be seen, and a forward pass equal to that of
transformers.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import vlmprune
from vlmprune.evaluation.tasks.clips.story import FRAMES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = ("pool", "stage", "train")
ONE_OF_EACH = dict.fromkeys(("still", "moment", "appear", "count", "change", "move", "order"), 1)
STEP = {"batch": 2, "dense_batch": 1, "dense_every": 9, "fewest": 64, "most": 80, "hints": 0.3, "fade": 0.7}
SCHEDULE = {"steps": 1, "lr": 1e-3, "muon": 1e-3, "warmup": 1, "decay": 0.5, "report": 9, "save": 9}


@pytest.fixture(scope="module")
def scripts():
    """The modules of the folder, which is no package; others share names with them."""
    folders = [str(BENCHMARKS / "video"), str(BENCHMARKS / "tiny")]
    known = set(sys.modules)
    sys.path[:0] = folders
    try:
        yield type("Scripts", (), {name: importlib.import_module(name) for name in (*OURS, "runs")})
    finally:
        for folder in folders:
            sys.path.remove(folder)
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def pool(scripts, tmp_path_factory):
    tiny = vlmprune.load("tiny")
    return scripts.pool.make(5, 14, ONE_OF_EACH, tmp_path_factory.mktemp("pool") / "clips", *tiny)


@pytest.fixture(scope="module")
def model(scripts):
    return scripts.train.start(0)


def words(scripts, pool, clip, question):
    names = {number: word for word, number in scripts.pool.WORD.items()}
    return [names[number] for number in pool.ids[clip, question].tolist() if number]


def frames_of(scripts, pool, clip, question):
    """Per thing that has to be seen, the frames in which it can be."""
    parts = pool.parts[clip, question].unflatten(-1, (FRAMES, -1)).any(-1)
    return [part.nonzero()[:, 0].tolist() for part in parts if part.any()]


@torch.no_grad()
def test_packed_questions_get_the_states_of_transformers(scripts, pool, model):
    decoder, part = model.model.language_model, pool.pick(np.arange(3))
    shown = scripts.stage.choose(part, 90, np.random.default_rng(0))
    for gaps in (False, True):
        prompt = scripts.stage.show(decoder, part, shown, gaps)
        states, _ = scripts.stage.run(decoder, prompt, teach=False)
        for clip, question in ((0, 0), (2, 1)):
            patches = part.tokens[clip, shown[clip]].float()
            asked = part.ids[clip, question, : part.first[clip, question] + 1]
            start = decoder.embed_tokens(torch.tensor(scripts.pool.FIRST_TURN))
            hidden = torch.cat([start, patches, decoder.embed_tokens(asked)])[None]
            places = shown[clip] + 2 if gaps else torch.arange(90) + 2
            end = 2 + (part.tokens.shape[1] if gaps else 90)
            positions = torch.cat([torch.arange(2), places, end + torch.arange(len(asked))])[None]
            theirs = decoder(inputs_embeds=hidden, position_ids=positions).last_hidden_state[0, -1]
            mine = states[clip, prompt.answers[clip, question]]
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_the_model_starts_as_the_image_model_with_four_words_more(scripts, model):
    tiny, _ = vlmprune.load("tiny")
    own = model.state_dict()
    for name, value in tiny.state_dict().items():
        assert torch.equal(own[name][: len(value)], value), name
    words_known = len(tiny.get_input_embeddings().weight)
    assert len(model.get_input_embeddings().weight) == words_known + len(scripts.pool.NEW_WORDS)
    assert not set(scripts.pool.NEW_WORDS) & set(list(scripts.pool.WORD)[:words_known])


def test_what_has_to_be_seen_is_where_it_was_drawn(scripts, pool):
    names = [scripts.pool.NAMES[number] for number in pool.family.tolist()]
    for clip, name in enumerate(names):
        said, seen = words(scripts, pool, clip, 0), frames_of(scripts, pool, clip, 0)
        answer = said[said.index("assistant:") + 1 : -1]
        assert said[-1] == "</s>"
        if name == "still":
            assert seen == [list(range(FRAMES))]
        if name == "move":
            assert seen == [[FRAMES - 1]] and len(answer) == 2
        if name == "count":
            assert len(seen) == int(answer[0]) and all(len(frames) == 1 for frames in seen)
        if name == "moment":
            assert [len(frames) for frames in seen] == ([1] if answer == ["yes"] else [])
        if name in ("appear", "change"):
            assert seen[0][-1] == FRAMES - 1 and seen[0][0] > 0
        if name == "order":
            swapped = words(scripts, pool, clip, 1)
            assert max(seen[0]) < FRAMES // 2 and frames_of(scripts, pool, clip, 1) == seen
            assert (said[5:7], said[9:11]) == (swapped[9:11], swapped[5:7]) and answer in (
                said[5:7],
                said[9:11],
            )


def test_more_questions_say_nothing_of_what_is_counted(scripts, pool):
    for clip in (pool.family == scripts.stage.COUNT).nonzero()[:, 0].tolist():
        plural = words(scripts, pool, clip, 0)[2]
        for question in range(1, scripts.pool.QUESTIONS):
            assert not [word for word in words(scripts, pool, clip, question) if plural.startswith(word[:4])]


def test_a_question_whose_things_are_not_shown_is_not_learnt_from(scripts, pool, model):
    part = pool.pick(np.arange(7))
    first = torch.arange(scripts.pool.PATCHES // FRAMES).expand(7, -1)  # the first frame alone
    prompt = scripts.stage.show(model.model.language_model, part, first, gaps=False)
    names = [scripts.pool.NAMES[number] for number in part.family.tolist()]
    known = dict(zip(names, prompt.known[:, 0].tolist(), strict=True))
    assert known["still"] and not known["appear"] and not known["change"] and not known["move"]


def test_a_step_changes_the_decoder_and_nothing_else(scripts, pool, tmp_path):
    model = scripts.train.start(1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    recipe = {"seed": 0, "decoder": STEP | SCHEDULE}
    scripts.stage.train(recipe, scripts.runs.Run(tmp_path), model, pool, pool)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved and all("language_model" in name for name in moved)
    assert any("embed_tokens" in name for name in moved)
