# SPDX-License-Identifier: Apache-2.0
"""Training of the natural model: what is looked for, what stays as it was, and a forward pass equal to that
of transformers.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.utils import is_torchvision_available

from vlmprune.evaluation.tasks.scenes.questions import FAMILIES
from vlmprune.evaluation.tasks.scenes.vocabulary import COLORS, PATTERNS, WORDS
from vlmprune.evaluation.tasks.shapes.model import IMAGE, UNKNOWN
from vlmprune.models.loading import encode, load
from vlmprune.models.tiny import BUNDLED

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = ("model", "data", "decoder", "runs", "vision", "stages", "qwen", "ship")
WIDE = (72, 120)  # pixels, down and across
SHARED = {"bf16": False, "lr": 1e-3, "muon": 1e-3, "warmup": 1, "decay": 0.5, "report": 9, "save": 9}
JOINT = SHARED | {"batch": 2, "steps": 1, "hints": 0.3, "fade": 0.6, "thin_every": 2, "fewest": 12}


@pytest.fixture(scope="module")
def scripts():
    """The modules of the folder, which is no package; some share their names with those of the tiny model."""
    folders = [str(BENCHMARKS / "natural"), str(BENCHMARKS / "tiny")]
    known, paths = set(sys.modules), list(sys.path)
    sys.path[:0] = folders
    try:
        yield type("Scripts", (), {name: importlib.import_module(name) for name in NAMES})
    finally:
        sys.path[:] = paths  # scripts add to it as well
        for name in set(sys.modules) - known:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def pool(scripts, tmp_path_factory):
    return scripts.data.make(5, 32, tmp_path_factory.mktemp("pool") / "pool.npz")


@pytest.fixture(scope="module")
def net(scripts):
    made = scripts.model.Natural(3)
    scripts.decoder.initialise(made.decoder, 3)
    return made.eval()


@pytest.fixture(scope="module")
def wide(scripts, tmp_path_factory):
    """A pool of pictures that are no squares, for the model with tokens of twelve pixels."""
    path = tmp_path_factory.mktemp("wide") / "pool.npz"
    return scripts.data.make(5, 4, path, WIDE, scripts.qwen.TOKEN)


@pytest.fixture(scope="module")
def qwen(scripts):
    made = scripts.qwen.NaturalQwen(3)
    scripts.decoder.initialise(made.decoder, 3)
    return made.eval()


@torch.no_grad()
def test_packed_questions_get_the_logits_of_transformers(scripts, pool, net):
    part = pool.pick(np.arange(2))
    hidden = net.see(part.pictures)
    prefix = scripts.decoder.prefix_of_patches(
        net.decoder, net.projector(hidden[scripts.model.FEATURES][:, 1:])
    )
    states, _ = scripts.decoder.run(net.decoder, prefix, part, scripts.data.of_patches(part, net))
    width, length = prefix.shape[1], scripts.data.LENGTH
    pixels = (part.pictures.permute(0, 3, 1, 2).float() - net.mean) / net.std
    for row, number in ((0, 0), (1, 7)):
        first = int(part.first[row, number])
        words = part.ids[row, number, : first + 1]
        image = torch.full((scripts.model.PATCHES,), WORDS.index("<image>"))
        start = torch.tensor([WORDS.index("<s>"), WORDS.index("user:")])
        ids = torch.cat([start, image, words])[None]
        theirs = net.llava(input_ids=ids, pixel_values=pixels[row : row + 1]).logits[0, -1]
        mine = states[row, width + number * length + first] @ net.decoder.embed_tokens.weight.T
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_an_answer_looks_for_the_noun_of_what_is_asked(scripts, pool):
    prompt = scripts.data.of_captions(pool, np.random.default_rng(0))
    for row in range(len(pool)):
        for number in range(scripts.data.QUESTIONS):
            columns = prompt.goal[row, number].nonzero().flatten().tolist()
            meant = [WORDS[i] for i in prompt.words[row, columns].tolist()]
            asked = int(pool.asked[row, number].sum())
            if FAMILIES[int(pool.family[row, number])] == "place":
                assert (
                    len(meant) == 1
                    and WORDS[int(pool.ids[row, number, pool.first[row, number] + 1])] == meant[0]
                )
            else:
                assert meant == (["object"] * asked or ["<s>"])


def test_where_no_patch_is_meant_the_first_token_is(scripts, pool, net):
    few = torch.zeros(len(pool), 1, dtype=torch.long)  # one corner of every picture
    goal = scripts.data.of_patches(pool, net, few).goal  # (B, QUESTIONS, 3)
    assert goal.any(-1).all() and goal[..., 0].any() and torch.equal(goal[..., 0], ~goal[..., 2])
    whole = scripts.data.of_patches(pool, net).goal
    there = pool.asked.any(-1)
    assert whole[there][:, 2:].any(-1).all() and not whole[there][:, 0].any()


def test_keys_are_the_colours_and_patterns_of_the_question_alone(scripts, pool):
    goal = scripts.decoder.keys(pool, 4)
    row, number = 0, next(i for i in range(10) if FAMILIES[int(pool.family[0, i])] == "exist")
    columns = goal[row, number].nonzero().flatten()
    words = [WORDS[int(i)] for i in pool.ids[row].flatten()[columns - 4]]
    assert len(words) == 2 and words[0] in COLORS and words[1] in PATTERNS
    assert (columns >= 4 + number * 10).all() and (
        columns < 4 + number * 10 + int(pool.first[row, number])
    ).all()


def test_patches_know_their_neighbours_in_shares(scripts, pool):
    seen, own = pool.seen(), pool.share.float()
    assert (seen >= 0).all() and (seen.sum(1) <= 1 + 1e-5).all()
    assert ((seen > 0).sum() > 1.3 * (own > 0).sum()) and (seen[own > 0] > 0).all()


def test_joint_training_leaves_the_tower_and_the_early_layers_alone(scripts, pool, tmp_path):
    net = scripts.model.Natural(4)
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    recipe = {"seed": 0, "joint": JOINT}
    dev = pool.pick(np.arange(32).repeat(4))
    scripts.stages.joint(recipe, scripts.runs.Run(tmp_path), net, [pool], [dev])
    moved = {name for name, weight in net.named_parameters() if not torch.equal(weight, before[name])}
    early = tuple(f"llava.model.language_model.layers.{i}." for i in range(scripts.model.EARLY))
    assert any("multi_modal_projector" in name for name in moved)
    assert any(f"layers.{scripts.model.EARLY}.self_attn" in name for name in moved)
    frozen = ("llava.model.vision_tower", "llava.model.language_model.embed_tokens", *early)
    assert not [name for name in moved if name.startswith(frozen)]


@torch.no_grad()
def test_pictures_of_any_shape_get_the_logits_of_transformers(scripts, wide, qwen):
    """All tokens, and some of them at the places they have in the picture."""
    assert wide.grid == (6, 10)
    features = qwen.features(wide.pictures)  # (n, 60, 4 x width)
    some = torch.tensor([[3, 17, 18, 40, 59]]).expand(len(wide), -1)
    images = scripts.qwen.build_image_processor()
    few = features.gather(1, some[..., None].expand(-1, -1, features.shape[-1]))
    for shown, kept in ((None, features), (some, few)):
        prefix = scripts.decoder.prefix_of_patches(qwen.decoder, qwen.project(kept))
        prompt = scripts.data.of_patches(wide, qwen, shown)
        states, _ = scripts.decoder.run(qwen.decoder, prefix, wide, prompt)
        width, length = prefix.shape[1], scripts.data.LENGTH
        for row, number in ((0, 0), (2, 7)):
            made = images(images=[Image.fromarray(wide.pictures[row].numpy())], return_tensors="pt")
            first = int(wide.first[row, number])
            words = wide.ids[row, number, : first + 1]
            start = torch.tensor([WORDS.index("<s>"), WORDS.index("user:")])
            ids = torch.cat([start, torch.full((60,), WORDS.index("<image>")), words])[None]
            mine = states[row, width + number * length + first] @ qwen.decoder.embed_tokens.weight.T
            torch.testing.assert_close(mine, theirs(qwen.qwen, ids, made, shown), atol=1e-4, rtol=1e-4)


def theirs(model, ids, made, shown):
    """Logits of the next word by the classes of transformers, of which some columns may be left out."""
    kinds = (ids == WORDS.index("<image>")).int()
    grids = made["image_grid_thw"]
    if shown is None:
        given = {"pixel_values": made["pixel_values"], "image_grid_thw": grids, "mm_token_type_ids": kinds}
        return model(input_ids=ids, **given).logits[0, -1]
    places, _ = model.model.get_rope_index(ids, kinds, image_grid_thw=grids)  # (3, 1, L)
    embedded = model.get_input_embeddings()(ids)
    embedded[kinds.bool()] = model.model.visual(made["pixel_values"], grid_thw=grids).pooler_output
    stay = torch.cat([torch.arange(2), 2 + shown[0], torch.arange(62, ids.shape[1])])
    hidden = model.model.language_model(inputs_embeds=embedded[:, stay], position_ids=places[..., stay])
    return model.lm_head(hidden.last_hidden_state)[0, -1]


@pytest.mark.skipif(not is_torchvision_available(), reason="its processor needs torchvision")
@torch.no_grad()
def test_the_files_of_the_second_architecture_give_its_logits(scripts, wide, qwen, tmp_path, monkeypatch):
    torch.save({"net": qwen.state_dict()}, tmp_path / "joint.pt")
    (tmp_path / "recipe.yaml").write_text("{seed: 3, architecture: qwen2_vl}")
    (tmp_path / "log.jsonl").write_text("")
    arguments = ["ship.py", str(tmp_path), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):  # there is no card of it
        scripts.ship.main()
    monkeypatch.setattr(sys, "argv", [*arguments, "--bare"])
    scripts.ship.main()
    model, processor = load(str(tmp_path / "out"))
    inputs = encode(model, processor, Image.fromarray(wide.pictures[1].numpy()), "what color is it ?")
    shown = inputs["input_ids"][0] == IMAGE
    assert int(shown.sum()) == 60 and not (inputs["input_ids"] == UNKNOWN).any()
    packed, grids = qwen.packed(wide.pictures[1:2])
    torch.testing.assert_close(inputs["pixel_values"], packed, atol=1e-5, rtol=1e-5)
    # the prompt of training: <s> user: picture question assistant:
    words = [WORDS[i] for i in inputs["input_ids"][0].tolist()]
    assert words[:3] == ["<s>", "user:", "<image>"] and words[-1] == "assistant:"
    kinds = shown[None].int()
    mine = qwen.qwen(
        input_ids=inputs["input_ids"], pixel_values=packed, image_grid_thw=grids, mm_token_type_ids=kinds
    )
    torch.testing.assert_close(model(**inputs).logits, mine.logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_decoder_that_learnt_text_reads_it_alike_in_the_other_architecture(scripts, pool, net, wide):
    made = scripts.qwen.NaturalQwen(5).eval()
    made.read_text_as(net.decoder.state_dict())
    part = pool.pick(np.arange(2))
    prompt = scripts.data.of_captions(part, np.random.default_rng(0))
    states = [
        scripts.decoder.run(one.decoder, one.decoder.embed_tokens(prompt.words), part, prompt)[0]
        for one in (net, made)
    ]
    torch.testing.assert_close(states[0], states[1], atol=1e-4, rtol=1e-4)


def test_vision_training_teaches_the_tower_and_not_the_merger(scripts, wide, qwen, tmp_path):
    net = scripts.qwen.NaturalQwen(4)
    before = {name: weight.clone() for name, weight in net.named_parameters()}
    options = SHARED | {"batch": 2, "steps": 1, "dense": 1.0, "caption": 10.0, "early": 0}
    scripts.vision.train({"seed": 0, "vision": options}, scripts.runs.Run(tmp_path), net, [wide], [wide])
    moved = {name for name, weight in net.named_parameters() if not torch.equal(weight, before[name])}
    assert {"qwen.model.visual.blocks.0.attn.qkv.weight", "dense.weight", "caption.1.weight"} <= moved
    assert not [name for name in moved if "language_model" in name or "merger" in name]


def test_pools_take_turns_and_a_picture_comes_once_before_any_comes_twice(scripts, pool, wide):
    """One pool alone takes from the generator what it always took."""
    rng = np.random.default_rng(1)
    order = np.random.default_rng(1).permutation(len(pool))
    source = scripts.data.batches([pool], 16, rng)
    found = [next(source) for _ in range(2)]
    expected = pool.pick(order)
    assert torch.equal(torch.cat([part.ids for part in found]), expected.ids)
    both = scripts.data.batches([pool, wide], 2, np.random.default_rng(2))
    shapes = [tuple(next(both).pictures.shape[1:3]) for _ in range(4)]
    assert shapes == [(96, 96), WIDE, (96, 96), WIDE]


def test_the_card_of_the_package_is_what_its_provenance_gives(scripts):
    folder = BUNDLED["natural"]
    found = json.loads((folder / "provenance.json").read_text())
    assert scripts.ship.card(found) == (folder / "card.md").read_text()


def test_a_run_tells_how_it_was_made(scripts, tmp_path):
    rows = [{"stage": "text", "step": 7, "dev": {}}, {"stage": "joint", "step": 9, "dev": {}}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.yaml").write_text("seed: 4")
    made = scripts.ship.making(tmp_path)
    assert made["recipe"] == {"seed": 4} and made["notes"] == ["all in one go, as the recipe says"]
    assert scripts.ship.by_stage(made["log"])["joint"] == [{"step": 9, "dev": {}}]
    (tmp_path / "notes.txt").write_text("stopped once\nresumed")
    assert scripts.ship.told(scripts.ship.making(tmp_path))["notes"] == "- stopped once\n- resumed"
