# SPDX-License-Identifier: Apache-2.0
"""Training of DyVTE's gates and of TextMonkey's block: what they learn from is what the session does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vlmprune
from vlmprune.core.weights import backbone_of, read_weights, write_weights
from vlmprune.errors import SpecError, UnsupportedError
from vlmprune.methods.dyvte import gate_features, read_gates
from vlmprune.methods.textmonkey import SHAPES
from vlmprune.testing.tiny import tiny_model
from vlmprune.training import exits
from vlmprune.training.data import NO_LOSS, batch_of, rows_that_answer, visual_of
from vlmprune.training.exits import SLACK, ExitTraining, Looks, margin_row
from vlmprune.training.loop import Pace, TrainingError, train
from vlmprune.training.rcp import RCPTraining
from vlmprune.training.resampler import ResamplerTraining
from vlmprune.training.run import run

SMALL = Pace(steps=3, batch_size=2, save_every=1)


@pytest.fixture(scope="module")
def looked(loaded, questions, tmp_path_factory) -> tuple[ExitTraining, Path]:
    """Gates whose questions were looked at, and where that is written."""
    training, folder = ExitTraining(*loaded, None, 8, 0), tmp_path_factory.mktemp("looks")
    training.prepare([*questions.train, *questions.dev], folder, 4)
    return training, folder


# --- exits ----------------------------------------------------------------------------------------


def test_a_look_is_what_the_dense_model_and_each_fixed_exit_say_of_a_question_alone(
    loaded, questions, looked
) -> None:
    model, processor = loaded
    looks = looked[0].looks
    assert looks is not None and looks.features.shape == (6, 7, 256)
    for place, one in enumerate(questions.train[:2]):
        inputs, labels = batch_of(model, processor, [one])
        start = int((labels[0] != NO_LOSS).nonzero()[0])
        states: list[torch.Tensor] = []
        layer = model.model.language_model.layers[3]
        hook = layer.register_forward_hook(
            lambda m, a, out, states=states: states.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            dense = model(**inputs).logits
        hook.remove()
        after = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[-1]) + 1
        feature = gate_features(states[0][:, after:start])[0]
        torch.testing.assert_close(looks.features[place, 3], feature, rtol=1e-4, atol=1e-4)
        rows = rows_that_answer(labels)
        with torch.no_grad(), vlmprune.prune(model, "dyvte(exit=3)"):
            short = model(**inputs).logits
        same = torch.equal(short[rows].argmax(dim=-1), dense[rows].argmax(dim=-1))
        assert bool(looks.same[place, 3]) == same
        wanted = labels[0][labels[0] != NO_LOSS]
        loss = torch.nn.functional.cross_entropy(short[rows], wanted)
        torch.testing.assert_close(looks.loss[place, 3], loss, rtol=1e-3, atol=1e-4)


def test_a_gate_should_leave_where_the_answer_and_nearly_the_loss_stay() -> None:
    dense = torch.tensor([1.0, 1.0, 1.0, 0.0])
    loss = torch.tensor([[1.04], [1.06], [1.0], [SLACK / 2]])
    same = torch.tensor([[True], [True], [False], [True]])
    looks = Looks(torch.zeros(4, 1, 2), same, loss, dense)
    assert looks.leave[:, 0].tolist() == [True, False, False, True]


def test_what_was_found_out_is_read_again_and_not_asked_again(looked, questions, monkeypatch) -> None:
    training, folder = looked
    again = ExitTraining(training.model, training.processor, None, 16, 1)
    monkeypatch.setattr(again, "look", None)  # calling it would fail
    asked = [*questions.train, *questions.dev]
    again.prepare(asked, folder, 4)
    assert again.looks is not None and training.looks is not None
    for name in exits.FIELDS:
        assert torch.equal(getattr(again.looks, name), getattr(training.looks, name))
    with pytest.raises(SpecError, match="is about other questions"):
        again.prepare(asked[1:], folder, 4)
    (path,) = folder.glob("looks-*.safetensors")
    broken = folder / "broken"
    broken.mkdir()
    (broken / path.name).write_bytes(path.read_bytes()[:40])
    with pytest.raises(SpecError, match="cannot be read"):
        again.prepare(asked, broken, 4)


def test_a_margin_trades_layers_for_answers_that_stay() -> None:
    ahead = torch.tensor([[3.0, 0.0], [1.0, 2.0], [-1.0, -1.0]])  # z_1 - z_0 of gates 0 and 1
    same = torch.tensor([[False, True], [False, True], [False, False]])
    assert margin_row(ahead, same, [0, 1], 0.0) == {"margin": 0.0, "same": 0.3333, "layers": 1.6667}
    assert margin_row(ahead, same, [0, 1], 1.5) == {"margin": 1.5, "same": 0.6667, "layers": 2.0}
    assert margin_row(ahead, same, [0, 1], 9.0) == {"margin": 9.0, "same": 1.0, "layers": 3.0}


def test_gates_learn_and_their_file_says_the_margin(loaded, questions, looked, tmp_path: Path) -> None:
    training = ExitTraining(*loaded, None, 8, 0)
    training.looks, training.places = looked[0].looks, looked[0].places
    before = float(training.loss(questions.train, 0.0))
    train(training, questions.train, Pace(steps=60, batch_size=4, lr=1e-2), tmp_path / "state", {})
    assert float(training.loss(questions.train, 1.0)) < 0.5 * before
    facts = {"backbone": backbone_of(loaded[0].config), **training.facts(questions.dev)}
    write_weights(tmp_path, "dyvte", training.tensors(), {**facts, "margin": 1e5})
    read = read_gates(str(tmp_path))
    assert read.facts["margins"][0]["margin"] == 0 and len(read.facts["leave"]) == 7
    picture, question, _ = vlmprune.example()
    inputs = vlmprune.encode(*loaded, picture, question)
    for option, left in (("", 144), (",margin=-100000", 0)):  # that of the file, and another one
        with torch.no_grad(), vlmprune.prune(loaded[0], f"dyvte(weights={str(tmp_path)!r}{option})") as done:
            loaded[0](**inputs)
        assert done.last.realised_tokens == [left]
    write_weights(tmp_path, "dyvte", training.tensors(), {**facts, "margin": "wide"})
    with pytest.raises(SpecError, match="margin of weights"):
        read_gates(str(tmp_path))


def test_exits_take_no_budget(loaded, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="keep=36; dyvte takes no budget"):
        run("dyvte", *loaded, "shapes", tmp_path, keep=36, samples=2, dev=1)


def test_the_whole_training_of_exits(loaded, tmp_path: Path) -> None:
    facts = run("dyvte", *loaded, "shapes", tmp_path, samples=4, dev=2, width=8, settings=SMALL)
    assert facts["dev"]["keep"] is None and any(name.startswith("exit=") for name in facts["dev"])
    assert read_gates(str(tmp_path)).sizes == {"width": 8, "2D": 256}
    with pytest.raises(UnsupportedError, match="this model is"):
        vlmprune.prune(tiny_model(), f"dyvte(weights={str(tmp_path)!r})")


# --- the block ------------------------------------------------------------------------------------


@pytest.fixture
def block(loaded) -> ResamplerTraining:
    """The block away from its start."""
    training, draw = ResamplerTraining(*loaded, 12, 16, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in training.module.values():
            value += 0.2 * torch.randn(value.shape, generator=draw)
    training.module.eval()
    return training


def test_the_sequence_in_training_is_that_of_the_session(block, questions, tmp_path: Path) -> None:
    model = block.model
    write_weights(
        tmp_path, "textmonkey", block.tensors(), {"backbone": backbone_of(model.config), "heads": 4}
    )
    inputs, labels = batch_of(model, block.processor, questions.train)
    visual, count = visual_of(block.adapter, inputs["input_ids"], 12)
    with torch.no_grad():
        made, short = block.student(inputs, labels, visual, 12)
        with vlmprune.prune(model, f"textmonkey(weights={str(tmp_path)!r})@12") as done:
            used = model(**inputs).logits
    assert done.last.realised_tokens == [12] * 4 and made.shape[1] == labels.shape[1] - count + 12
    assert torch.equal(short[short != NO_LOSS], labels[labels != NO_LOSS])
    torch.testing.assert_close(
        made[rows_that_answer(short)], used[rows_that_answer(labels)], rtol=1e-3, atol=1e-3
    )


def test_before_the_first_step_the_block_is_the_filter(loaded, questions) -> None:
    training = ResamplerTraining(*loaded, 12, 16, 0)
    inputs, labels = batch_of(*loaded, questions.train[:2])
    visual, _ = visual_of(training.adapter, inputs["input_ids"], 12)
    with torch.no_grad():
        made, short = training.student(inputs, labels, visual, 12)
        with vlmprune.prune(loaded[0], "textmonkey@12"):
            used = loaded[0](**inputs).logits
    torch.testing.assert_close(
        made[rows_that_answer(short)], used[rows_that_answer(labels)], rtol=1e-3, atol=1e-3
    )


def test_every_weight_of_the_block_gets_a_gradient(block, questions) -> None:
    block.module.train()
    block.loss(list(questions.train[:2]), 0.5).backward()
    still = [
        name for name, value in block.module.items() if value.grad is None or not bool(value.grad.abs().max())
    ]
    assert still == []


@pytest.mark.parametrize("made", [ResamplerTraining, RCPTraining, ExitTraining])
def test_an_interrupted_training_goes_on_to_the_same_weights(
    made, loaded, questions, looked, tmp_path: Path
) -> None:
    for folder, stops in (("a", (None,)), ("b", (1, None))):
        for stop in stops:
            training = made(*loaded, None if made is ExitTraining else 12, 16, 0)
            if isinstance(training, ExitTraining):
                training.looks, training.places = looked[0].looks, looked[0].places
            pace = Pace(steps=2, batch_size=1, save_every=1)
            train(training, questions.train, pace, tmp_path / folder, {}, stop_after=stop)
        facts = {"backbone": backbone_of(loaded[0].config), **training.facts(None)}
        write_weights(tmp_path / folder, made.method, training.tensors(), facts)
    # float32 as it is: equal files have equal weights
    through, stopped = (tmp_path / name / f"{made.method}.safetensors" for name in "ab")
    assert through.read_bytes() == stopped.read_bytes()
    first = made(*loaded, None if made is ExitTraining else 12, 16, 0).tensors()
    assert any(not torch.equal(first[name], value) for name, value in training.tensors().items())


def test_weights_in_half_precision_are_read_as_float32(loaded, tmp_path: Path) -> None:
    training = ResamplerTraining(*loaded, 12, 16, 0)
    facts = {"backbone": backbone_of(loaded[0].config), **training.facts(None)}
    for folder, half in (("whole", False), ("half", True)):
        write_weights(tmp_path / folder, "textmonkey", training.tensors(), facts, half)
    whole, half = (tmp_path / folder / "textmonkey.safetensors" for folder in ("whole", "half"))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    read = read_weights(str(tmp_path / "half"), "textmonkey", SHAPES).tensors
    for name, value in training.tensors().items():
        assert torch.equal(read[name], value.half().float())


def test_a_width_that_no_heads_divide_is_refused(loaded) -> None:
    with pytest.raises(SpecError, match="multiple of 4"):
        ResamplerTraining(*loaded, 12, 18, 0)
    for training in (ResamplerTraining, ExitTraining):
        with pytest.raises(UnsupportedError, match="plain causal mask"):
            training(tiny_model("gemma3"), None, None, None, 0)


# --- early stop -----------------------------------------------------------------------------------


class Falling:
    """A training whose loss of other questions is best after the second step."""

    method, budgeted, settings = "falling", True, {"keep": 1}
    model_digest = "0"

    def __init__(self) -> None:
        self.module = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.tensor([3.0]))})
        self.looked = [9.0, 5.0, 1.0, 4.0, 3.0, 2.0, 0.0]  # the first one before a step

    def loss(self, asked, progress):
        own = self.module["w"].square().sum()
        return own if self.module.training else own * 0 + self.looked.pop(0)


def stopped_early(folder: Path, questions, stop=None) -> Falling:
    training = Falling()
    if (folder / "state.json").is_file():  # looks that were made before
        training.looked = training.looked[json.loads((folder / "state.json").read_text())["done"] + 1 :]
    pace = Pace(steps=6, batch_size=1, save_every=1, patience=2)
    train(training, questions.train, pace, folder, {}, stop_after=stop, dev=questions.dev[:1])
    return training


def test_a_training_ends_early_with_its_best_weights_interrupted_or_not(questions, tmp_path: Path) -> None:
    through = stopped_early(tmp_path / "a", questions)
    assert through.looked == [2.0, 0.0], "it ends two checkpoints behind the best one"
    best = stopped_early(tmp_path / "two", questions, stop=2)  # which is the best one
    assert torch.equal(through.module["w"], best.module["w"])
    stopped_early(tmp_path / "b", questions, stop=3)
    again = stopped_early(tmp_path / "b", questions)
    assert torch.equal(through.module["w"], again.module["w"]) and again.looked == [2.0, 0.0]
    assert json.loads((tmp_path / "b" / "state.json").read_text())["done"] == 4
    over = stopped_early(tmp_path / "b", questions)  # nothing is left to do
    assert torch.equal(through.module["w"], over.module["w"])


def test_a_training_that_only_harms_ends_where_it_began(questions, tmp_path: Path) -> None:
    training, pace = Falling(), Pace(steps=6, batch_size=1, save_every=1, patience=2)
    training.looked = [0.5, 5.0, 1.0]
    train(training, questions.train, pace, tmp_path, {}, dev=questions.dev[:1])
    assert training.looked == [] and training.module["w"].tolist() == [3.0]


def test_other_questions_without_a_finite_loss_end_the_training(questions, tmp_path: Path) -> None:
    training, pace = Falling(), Pace(steps=2, batch_size=1, patience=1)
    training.looked = [1.0, 1.0, float("nan"), float("nan")]  # two questions, before the steps and after them
    with pytest.raises(TrainingError, match="the loss of the other questions after 2 steps is nan"):
        train(training, questions.train, pace, tmp_path, {}, dev=questions.dev)
    with pytest.raises(SpecError, match="asks for other questions"):
        train(training, questions.train, pace, tmp_path, {})
