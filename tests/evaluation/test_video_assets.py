# SPDX-License-Identifier: Apache-2.0
"""The video model in the package: files, and that it answers what the image model cannot."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app
from vlmprune.evaluation.answer.evaluate import evaluate
from vlmprune.evaluation.tasks.clips import clips
from vlmprune.evaluation.tasks.clips.example import example
from vlmprune.models.tiny import BUNDLED, SUMS, verify

FOLDER = BUNDLED["video"]
MiB = 1024 * 1024


@pytest.fixture(scope="module")
def video():
    return vlmprune.load("video")


def test_every_file_is_in_the_list():
    assert set(verify(FOLDER)) == {path.name for path in FOLDER.iterdir()} - {SUMS}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 6 * MiB


def test_it_is_the_image_model_with_another_decoder(video):
    model, processor = video
    assert type(model) is transformers.LlavaForConditionalGeneration and not model.training
    tiny, _ = vlmprune.load("tiny")
    own = model.state_dict()
    for name, value in tiny.state_dict().items():
        if "vision_tower" in name or "projector" in name:
            assert torch.equal(own[name], value), name
    unknown = processor.tokenizer.unk_token_id
    ids = processor.tokenizer("which comes first , the red bar or the last frame ?").input_ids
    assert unknown not in ids


@pytest.mark.parametrize("family", ["move", "change"])
def test_it_knows_what_changes_over_time(video, family):
    task = clips()
    samples = [task.sample("dev", family, number) for number in range(3)]
    found = list(evaluate(*video, samples, ["dense"], task, batch_size=3, max_new_tokens=4))
    assert sum(one.score for one in found) >= 2


def test_the_card_states_what_the_provenance_measured():
    found = json.loads((FOLDER / "provenance.json").read_text())
    card = (FOLDER / "card.md").read_text()
    image, model = (found["measured"][f"{kind} model"] for kind in ("image", "video"))
    for family, blind in found["blind"].items():
        line = (
            f"| {family} | {blind:.3f} | {image['families'][family]:.3f} | {model['families'][family]:.3f} |"
        )
        assert line in card
    assert found["fingerprint"] == clips().fingerprint
    assert model["families"]["move"] > image["families"]["move"] + 0.5


def test_the_example_is_a_clip_that_can_be_asked_about():
    clip, question, answer = example()
    assert len(clip.frames) == len(clip.times) == 8 and question.endswith("in the last frame ?")
    run = CliRunner().invoke(app, ["run", "--model", "video", "--prune", "evs@0.3", "--no-dense", "--json"])
    assert run.exit_code == 0, run.output
    said = json.loads(run.stdout)
    assert said["question"] == question and said["expected"] == answer
    assert len(said["clip"]["kept"]) == 8 and sum(said["clip"]["kept"]) == 345
