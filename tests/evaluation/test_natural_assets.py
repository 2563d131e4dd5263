# SPDX-License-Identifier: Apache-2.0
"""The natural model in the package: files, what it answers, and that random pruning leaves it most."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
import transformers

import vlmprune
from vlmprune.evaluation.tasks.scenes import scenes
from vlmprune.evaluation.tasks.scenes.example import example
from vlmprune.models.tiny import BUNDLED, SUMS, verify
from vlmprune.registry import list_methods

FOLDER = BUNDLED["natural"]
MiB = 1024 * 1024
QUESTIONS = 60


@pytest.fixture(scope="module")
def natural():
    return vlmprune.load("natural")


@torch.no_grad()
def scores(model, processor):
    """Right or wrong by family, over dev questions."""
    task, found = scenes(), defaultdict(list)
    for sample in task.samples("dev", QUESTIONS):
        text = processor.apply_chat_template(sample.messages(), add_generation_prompt=True)
        inputs = processor(images=sample.load_images(), text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found[sample.family].append(task.score(sample, processor.decode(ids, skip_special_tokens=True)))
    return found


def test_every_file_is_in_the_list():
    assert set(verify(FOLDER)) == {path.name for path in FOLDER.iterdir()} - {SUMS}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 8 * MiB


def test_it_is_a_plain_llava(natural):
    model, processor = natural
    assert type(model) is transformers.LlavaForConditionalGeneration and not model.training
    assert isinstance(processor, transformers.LlavaProcessor) and model.dtype == torch.float32


def test_it_answers_better_than_a_guesser_and_random_pruning_leaves_it_most(natural):
    model, processor = natural
    whole = scores(model, processor)
    blind = scenes().blind
    assert np.mean([np.mean(v) - blind[f] for f, v in whole.items()]) > 0.25
    with vlmprune.prune(model, "random@16"):
        pruned = scores(model, processor)
    mean = [np.mean([np.mean(v) for v in found.values()]) for found in (whole, pruned)]
    assert 0.6 < mean[1] / mean[0] <= 1.0


def test_the_example_can_be_asked(natural):
    made = example()
    assert made.picture.size == (96, 96) and made.answer in ("red", "green", "blue", "yellow", "purple")
    model, processor = natural
    with vlmprune.prune(model, "fastervlm@16") as run, torch.no_grad():
        model(**vlmprune.encode(model, processor, made.picture, made.question))
    assert run.last.realised_tokens == [16]


def test_the_card_states_what_the_provenance_measured():
    found = json.loads((FOLDER / "provenance.json").read_text())
    card = (FOLDER / "card.md").read_text()
    assert f"{found['rows']['dense']['accuracy']:.3f}" in card
    assert f"{found['properties']['tower']['cls auc asked']:.3f}" in card
    assert f"{found['rows']['random@16']['retained']:.3f}" in card


def test_the_halves_of_the_methods_are_methods_and_do_not_overlap():
    path = FOLDER.parents[1] / "evaluation" / "tasks" / "scenes" / "designed_with.json"
    halves = json.loads(path.read_text())["natural"]
    designed, held_out = set(halves["designed_with"]), set(halves["held_out"])
    assert designed and held_out and not designed & held_out
    assert designed | held_out <= set(list_methods())
