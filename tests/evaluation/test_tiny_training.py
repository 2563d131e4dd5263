# SPDX-License-Identifier: Apache-2.0
"""Training of the tiny model: labels, packs, and a forward pass equal to that of transformers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmprune.evaluation.tasks.shapes import shapes
from vlmprune.evaluation.tasks.shapes.model import GRID, PATCH, build_processor
from vlmprune.evaluation.tasks.shapes.render import mask
from vlmprune.evaluation.tasks.shapes.vocabulary import WORDS

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "tiny"
OPTIONS = {
    "batch": 3,
    "tokens": [40],
    "bf16": False,
    "noise": 0.1,
    "attention": 0.3,
    "look": 2.0,
    "anneal": 2.0,
    "steps": 2,
    "lr": 1e-3,
    "muon": 1e-3,
    "warmup": 1,
    "decay": 0.5,
    "report": 1,
    "save": 1,
    "dev": 4,
    "family_weight": {"count": 2.0},
    "count_weight": {"4": 3.0},
}


@pytest.fixture(scope="module")
def scripts():
    """The modules of the folder, which is no package."""
    names = ("data", "packs", "decoder", "language", "joint", "runs")
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield type("Scripts", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in (*names, "vision"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def store(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    scripts.data.write(folder, seed=5, items=24, shard=0, shards=1, size=12, per_item=8)
    return scripts.packs.Store(folder)


def test_a_label_is_what_the_patch_shows(scripts):
    for family in ("text", "needle", "count"):
        scene = shapes().sample("train", family, 1).scenes[0]
        labels = scripts.data.patch_labels(scene).reshape(GRID, GRID, -1)
        for number, thing in enumerate(scene.things):
            share = mask((thing,)).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3))
            shown = labels[..., scripts.packs.OWNER] == number + 1
            assert shown.any() and shown[share > 0.6].all() and not shown[share == 0].any()
            assert set(labels[shown][:, 1]) == {list(scripts.data.CLASSES["color"]).index(thing.color) + 1}
            read = [
                scripts.data.CLASSES["character"][k - 1]
                for k in labels[shown][labels[shown][:, 4].argsort(), 3]
                if k
            ]
            assert "".join(read) == thing.text.lower()
            assert labels[shown][:, scripts.packs.CENTRE].sum() == 1


def test_a_mention_is_a_noun(scripts):
    for seed in range(20):
        for question in scripts.data.item(9, seed, 8)[1]:
            ids, first, targets = scripts.data.encode(question)
            words = [WORDS[i] for i in ids]
            assert (
                words[first] == "assistant:"
                and words[first + 1 : -1] == question.answer.split()
                and words[-1] == "</s>"
            )
            nouns = {words[position] for position, kind, _, _ in targets if kind == scripts.data.NOUN}
            assert nouns and nouns.isdisjoint({"the", "?", "is", "a"})


def test_a_pack_hides_other_questions(scripts, store):
    batch = scripts.packs.collate(store, np.flatnonzero(~store.two)[:2], 40, np.random.default_rng(0))
    width = len(batch.prefix)
    same = batch.question[:, :, None] == batch.question[:, None, :]
    text = batch.mask[:, 0, width:, width:]
    assert torch.equal(text, same & torch.ones_like(text[0]).tril())
    assert batch.mask[:, 0, width:, :width].all() and not batch.mask[:, 0, :width, width:].any()


@torch.no_grad()
def test_the_forward_is_that_of_transformers(scripts, store):
    """A pack with a block mask gives the logits of each question alone."""
    net = scripts.joint.Joint(1).eval()
    model, processor = net.export().eval(), build_processor()
    for items in (np.flatnonzero(~store.two)[:1], np.flatnonzero(store.two)[:1]):
        batch = scripts.packs.collate(store, items, GRID * GRID, np.random.default_rng(0))
        pictures = store.pictures(batch.scenes.numpy().ravel())
        hidden, _ = net.see(pictures, last=False)
        embeds = scripts.joint.sequence(net, batch, net.projector(hidden[:, 1:]))
        states, _ = scripts.decoder.run(
            net.language.decoder, embeds, batch, teach=True, places=net.language.places
        )
        logits = states[0, len(batch.prefix) :] @ net.language.decoder.embed_tokens.weight.T
        pixels = processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        for question in batch.question[0].unique():
            if question >= 0:
                here = batch.question[0] == question
                ids = torch.tensor([batch.prefix.tolist() + batch.ids[0, here].tolist()])
                alone = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[
                    0
                ]
                assert torch.allclose(logits[here], alone[-int(here.sum()) :], atol=1e-4)


def test_a_stage_resumes_where_it_stopped(scripts, store, tmp_path):
    run = scripts.runs.Run(tmp_path)
    recipe = {"seed": 0, "language": OPTIONS}
    net = scripts.language.train(recipe, run, store, store)
    again = scripts.language.train(recipe, scripts.runs.Run(tmp_path), store, store)
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True)
    )
    scripts.language.train({"seed": 0, "language": OPTIONS | {"steps": 3}}, run, store, store)
    assert torch.load(tmp_path / "language.pt", weights_only=True)["step"] == 3
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 3
